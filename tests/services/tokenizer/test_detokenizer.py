"""Detokenizer: the pieces are what decoding everything at once adds to the prompt."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from llmservices.tokenizer.detokenizer import TableDetokenizer, WindowDetokenizer, open_detokenizer
from llmservices.tokenizer.vocabulary import Vocabulary

TABLES = ["byte_level", "fallback", "fallback_strip"]
WINDOWS = ["word_piece", "metaspace", "undecoded"]
Vocabularies = dict[str, Vocabulary]


def pieces(vocabulary: Vocabulary, prompt: list[int], output: list[int]) -> list[str]:
    detokenizer = open_detokenizer(vocabulary, prompt)
    return [*(detokenizer.push(token) for token in output), detokenizer.finish()]


def run_of_bytes(data: bytes) -> str:
    """A broken byte in a run becomes U+FFFD, a whole character stays."""
    return re.sub("[\udc80-\udcff]", "\ufffd", data.decode(errors="surrogateescape"))


def fallback_oracle(vocabulary: Vocabulary, tokens: list[int], *, strip: bool) -> str:
    """The stated text, written the slow way: run by run."""
    text, run = "", b""
    for token in tokens:
        content = vocabulary.token_text(token) if token >= 259 else ""
        if 3 <= token < 259:
            run += bytes([token - 3])
        elif content:
            text += run_of_bytes(run) + content
            run = b""
    text += run_of_bytes(run)
    return text[1:] if strip and text.startswith(" ") else text


@given(data=st.data())
def test_byte_level_equals_decode(data: st.DataObject, vocabularies: Vocabularies) -> None:
    vocabulary = vocabularies["byte_level"]
    ids = st.lists(st.integers(0, vocabulary.tokens + 2), max_size=24)
    output = data.draw(ids)
    assert "".join(pieces(vocabulary, [], output)) == vocabulary.decode(output)


# An added token inside the byte alphabet, as é here, is read as bytes by the library, and so by us.
@given(text=st.text(st.characters(exclude_characters="é", codec="utf-8")), cut=st.integers(0, 60))
def test_byte_level_behind_a_prompt(text: str, cut: int, vocabularies: Vocabularies) -> None:
    vocabulary = vocabularies["byte_level"]
    tokens = vocabulary.encode(text)
    prompt, output = tokens[:cut], tokens[cut:]
    shown = vocabulary.decode(prompt)
    whole = shown.rstrip("\ufffd") if not text.startswith(shown) else shown
    expected = text[len(whole) :] if output else ""
    assert "".join(pieces(vocabulary, prompt, output)) == expected


@pytest.mark.parametrize("kind", ["fallback", "fallback_strip"])
@given(output=st.lists(st.integers(0, 270), max_size=24))
def test_fallback_equals_the_stated_text(
    kind: str, output: list[int], vocabularies: Vocabularies
) -> None:
    vocabulary = vocabularies[kind]
    expected = fallback_oracle(vocabulary, output, strip=kind == "fallback_strip")
    assert "".join(pieces(vocabulary, [1], output)) == expected


@pytest.mark.parametrize("kind", ["fallback", "fallback_strip"])
@given(text=st.text(max_size=30), cut=st.integers(0, 60))
def test_fallback_equals_decode_for_whole_characters(
    kind: str, text: str, cut: int, vocabularies: Vocabularies
) -> None:
    vocabulary = vocabularies[kind]
    tokens = vocabulary.encode(text)
    output = tokens[cut:]
    full = vocabulary.decode(tokens)
    got = "".join(pieces(vocabulary, tokens[:cut], output))
    assert full.endswith(got)
    assert cut > 1 or got == full


@given(data=st.binary(max_size=8))
def test_fallback_equals_decode_for_runs_without_a_whole_character(
    data: bytes, vocabularies: Vocabularies
) -> None:
    run = [byte + 3 for byte in data if byte >= 0x80]
    if set(run_of_bytes(bytes(token - 3 for token in run))) <= {"\ufffd"}:
        vocabulary = vocabularies["fallback"]
        output = [260, *run, 260]
        assert "".join(pieces(vocabulary, [], output)) == vocabulary.decode(output)


@pytest.mark.parametrize("kind", WINDOWS)
@given(data=st.data())
def test_other_decoders_equal_decode(
    kind: str, data: st.DataObject, vocabularies: Vocabularies
) -> None:
    vocabulary = vocabularies[kind]
    ids = st.lists(st.integers(0, vocabulary.tokens - 1), max_size=30)
    prompt, output = data.draw(ids), data.draw(ids)
    assert vocabulary.decode(prompt) + "".join(pieces(vocabulary, prompt, output)) == (
        vocabulary.decode(prompt + output)
    )


@pytest.mark.parametrize(
    ("kind", "type_"),
    [(kind, TableDetokenizer) for kind in TABLES] + [(kind, WindowDetokenizer) for kind in WINDOWS],
)
def test_the_fast_path_is_taken(kind: str, type_: type, vocabularies: Vocabularies) -> None:
    assert isinstance(open_detokenizer(vocabularies[kind], []), type_)


@given(tokens=st.lists(st.integers(0, 520), max_size=30))
def test_no_piece_is_half_a_character(tokens: list[int], vocabularies: Vocabularies) -> None:
    for kind in TABLES:
        for piece in pieces(vocabularies[kind], [], tokens):
            piece.encode()  # a lone surrogate would raise
        assert len(pieces(vocabularies[kind], [], tokens)) == len(tokens) + 1


@pytest.mark.parametrize(
    ("kind", "prompt", "output", "expected"),
    [
        # The space that ▁ stands for is dropped only where the whole text begins.
        ("fallback_strip", [], ["▁a"], ["a", ""]),
        ("fallback_strip", ["<s>"], ["▁a", "▁a"], ["a", " a", ""]),
        ("fallback_strip", ["a"], ["▁a"], [" a", ""]),
        ("fallback_strip", ["▁"], ["▁a"], [" a", ""]),
        ("fallback_strip", [], ["▁", "▁a"], ["", " a", ""]),
        ("fallback", [], ["▁a"], [" a", ""]),
        # A character of three bytes appears with its last one; broken ones at the end.
        ("fallback", [], ["<0xE6>", "<0x97>", "<0xA5>"], ["", "", "日", ""]),
        ("fallback", ["<0xE6>"], ["<0x97>", "<0xA5>"], ["", "日", ""]),
        ("fallback", [], ["<0xE6>", "<0x97>"], ["", "", "\ufffd\ufffd"]),
        ("fallback", [], ["<0xE6>", "<0x97>", "a"], ["", "", "\ufffd\ufffda", ""]),
        ("fallback", [], ["<0xE6>", "</s>", "<0x97>", "<0xA5>"], ["", "", "", "日", ""]),
        # What the prompt broke is the prompt's, unless the output goes on with it.
        ("fallback", ["<0xE6>"], [], [""]),
        ("fallback", ["<0xE6>"], ["a"], ["a", ""]),
        ("fallback", ["<0xE6>"], ["<0xE6>"], ["", "\ufffd"]),
        ("fallback", ["<0xE6>"], ["</s>", "<0x97>"], ["", "", "\ufffd\ufffd"]),
        ("byte_level", ["æ"], ["a", "æ"], ["a", "", "\ufffd"]),
        ("byte_level", [], ["Ã", "©"], ["", "é", ""]),
        ("byte_level", ["Ã"], ["©", "he"], ["é", "he", ""]),
        ("byte_level", [], ["æ", "Ĺ"], ["", "", "\ufffd"]),
        ("byte_level", [], ["í", "ł"], ["", "", "\ufffd\ufffd"]),  # half of a surrogate
        ("byte_level", [], ["í", "ł", "a"], ["", "", "\ufffd\ufffda", ""]),
        ("fallback", [], ["<0xED>", "<0xA0>", "<0x80>"], ["", "", "\ufffd" * 3, ""]),
        ("byte_level", [], ["<|end|>", "two words", "<tool>"], ["", "two words", "<tool>", ""]),
        ("metaspace", [], ["▁a", "▁b"], ["a", " b", ""]),
        ("word_piece", ["hello"], ["##ing", "world"], ["ing", " world", ""]),
    ],
)
def test_pieces(
    kind: str, prompt: list[str], output: list[str], expected: list[str], vocabularies: Vocabularies
) -> None:
    vocabulary = vocabularies[kind]
    ids = {vocabulary.content(token): token for token in range(vocabulary.tokens)}
    assert pieces(vocabulary, [ids[t] for t in prompt], [ids[t] for t in output]) == expected
