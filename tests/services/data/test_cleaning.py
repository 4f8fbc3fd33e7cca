"""Cleaning, duplicates and augmentation of single rows."""

import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llmproto.errors import RemoteError
from llmproto.recipes import AugmentOptions, CleanOptions
from llmservices.data.augmenting import copies, read_synonyms
from llmservices.data.cleaning import clean, masked
from llmservices.data.duplicates import Seen, minhash, shingles
from llmservices.data.rows import Chat, Completion, Labelled, Text, Turn


@pytest.mark.parametrize(
    ("before", "after", "change"),
    [
        ("Ã©tÃ©", "été", "repaired"),
        ("e\u0301", "é", "normalized"),
        ("a\x00b\x1b\ufeff\tc\r\nd\re", "ab\tc\nd\ne", "control_characters"),
    ],
)
def test_repairs(before: str, after: str, change: str) -> None:
    assert clean([before], CleanOptions()) == ([after], [change], None)


def test_nothing_is_done_unasked() -> None:
    options = CleanOptions(repair=False, normalize="none", control_characters=False)
    text = "Ã© e\u0301 \x00 a@b.org ½"
    assert clean([text], options) == ([text], [], None)
    assert clean(["½"], CleanOptions(normalize="NFKC")).texts == ["1⁄2"]


@pytest.mark.parametrize(
    ("what", "before", "after"),
    [
        ("email", "write to a.b+c@mail.example.org, now", "write to <email>, now"),
        ("email", "not@", "not@"),
        ("phone", "call +49 30 1234567 or (030) 123-4567.", "call <phone> or <phone>."),
        ("phone", "+14155550123", "<phone>"),
        ("phone", "415-555-0123 x", "<phone> x"),
        (
            "phone",
            "in 2019-2020, 1.2.3.4, 192.168.100.200",
            "in 2019-2020, 1.2.3.4, 192.168.100.200",
        ),
        ("key", "sk-proj-abcdefghijklmnop1234 here", "<key> here"),
        ("key", "AKIAIOSFODNN7EXAMPLE", "<key>"),
        ("key", "ghp_0123456789abcdefghijABCDEFGHIJ012345", "<key>"),
        ("key", "-----BEGIN RSA PRIVATE KEY-----\nMII\n-----END RSA PRIVATE KEY-----", "<key>"),
        ("key", "a sketchy risk-averse skill", "a sketchy risk-averse skill"),
    ],
)
def test_masks(what: str, before: str, after: str) -> None:
    assert masked(before, what) == after


@pytest.mark.parametrize(
    ("options", "text", "reason"),
    [
        (CleanOptions(), "  \n", "too_few_characters"),
        (CleanOptions(characters_min=3), "ab", "too_few_characters"),
        (CleanOptions(characters_max=3), "abcd", "too_many_characters"),
        (CleanOptions(letters_share_min=0.8), "a1b2", "few_letters"),
        (CleanOptions(repetition_max=0.2), "buy it now " * 20, "repetitive"),
        (CleanOptions(repetition_max=0.2), "all of these words are different from others", None),
    ],
)
def test_filters(options: CleanOptions, text: str, reason: str | None) -> None:
    assert clean([text], options).dropped == reason


@settings(max_examples=100, deadline=None)
@given(st.text())
def test_cleaning_twice_changes_nothing_more(text: str) -> None:
    options = CleanOptions(repair=False, mask=["email", "phone", "key"])
    once = clean([text], options)
    assert clean(once.texts, options).texts == once.texts


def test_exact_duplicates() -> None:
    seen = Seen("exact", 1.0)
    assert [seen.again(key, "") for key in (b"a", b"b", b"a")] == [None, None, "duplicate"]
    assert Seen("none", 1.0).again(b"a", "") is None


def test_near_duplicates_and_what_only_looks_alike() -> None:
    draw = random.Random(0)
    words = [f"word{draw.randrange(5000)}" for _ in range(200)]
    text = " ".join(words)
    near = " ".join([*words[:-1], "other"])
    half = " ".join([*words[:100], *(f"x{place}" for place in range(100))])
    seen = Seen("near", 0.85)
    found = [seen.again(one.encode(), one) for one in (text, near, half, text)]
    assert found == [None, "near_duplicate", None, "duplicate"]


def test_the_estimate_is_near_the_similarity() -> None:
    draw = random.Random(1)
    words = [f"word{draw.randrange(5000)}" for _ in range(300)]
    for kept in (290, 270, 240):
        other = [*words[:kept], *(f"x{place}" for place in range(300 - kept))]
        one, two = set(shingles(" ".join(words))), set(shingles(" ".join(other)))
        estimate = minhash(" ".join(words)).jaccard(minhash(" ".join(other)))
        assert abs(estimate - len(one & two) / len(one | two)) < 0.15


SYNONYMS = {"good": ["fine", "great"], "film": ["movie"]}
ALL = AugmentOptions(copies=4, delete=0.1, swap=0.1, insert=0.2, replace=0.3, synonyms="s", seed=3)


def test_copies_depend_on_seed_row_and_nothing_else() -> None:
    row = Labelled("a Good film, and a long one at that", None, "pos")
    first = copies(row, ALL, SYNONYMS, row=7)
    copies(row, ALL, SYNONYMS, row=8)
    assert copies(row, ALL, SYNONYMS, row=7) == first
    assert copies(row, ALL, SYNONYMS, row=8) != first
    assert row not in first
    assert all(isinstance(copy, Labelled) and copy.label == "pos" for copy in first)


def test_each_change() -> None:
    row = Text("a Good film.")
    replace = AugmentOptions(copies=8, replace=1.0, synonyms="s")
    texts = [copy.text for copy in copies(row, replace, SYNONYMS, row=0) if isinstance(copy, Text)]
    assert "a Great movie." in texts or "a Fine movie." in texts
    (swapped,) = copies(row, AugmentOptions(swap=1.0, seed=1), {}, row=0)
    assert isinstance(swapped, Text) and sorted(swapped.text.split()) == ["Good", "a", "film."]
    (deleted,) = copies(row, AugmentOptions(delete=1.0), {}, row=0)
    assert isinstance(deleted, Text) and deleted.text in row.text.split()
    assert copies(row, AugmentOptions(), {}, row=0) == []


def test_answers_are_never_changed() -> None:
    options = AugmentOptions(copies=3, delete=0.5)
    for copy in copies(Completion("a b c d", "e f g h"), options, {}, row=0):
        assert isinstance(copy, Completion) and copy.completion == "e f g h"
    chat = Chat((Turn("user", "a b c d"), Turn("assistant", "e f g h")))
    for copy in copies(chat, options, {}, row=0):
        assert isinstance(copy, Chat) and copy.turns[1] == chat.turns[1]


def test_a_list_of_synonyms(tmp_path: Path) -> None:
    path = tmp_path / "synonyms.txt"
    path.write_text("# words\nGood: fine, great\n\nfilm: movie\n")
    assert read_synonyms(path) == SYNONYMS
    path.write_text("good: fine\nbad\n")
    with pytest.raises(RemoteError, match=r"synonyms\.txt:2: is no line"):
        read_synonyms(path)
    with pytest.raises(RemoteError, match="cannot be read"):
        read_synonyms(tmp_path / "none")
