"""StopMatcher: whatever the cuts, what a search through the whole text finds."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from llmservices.tokenizer.stops import StopMatcher

TEXTS = st.text(alphabet="abc]-^é", max_size=40)
STOPS = st.lists(st.text(alphabet="abc]-^é", min_size=1, max_size=6), min_size=1, max_size=5)


def oracle(text: str, stops: list[str]) -> tuple[str, str | None]:
    """The first stop string to be complete; of several, the longest."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            stop = max(complete, key=len)
            return text[: end - len(stop)], stop
    return text, None


def run(pieces: list[str], stops: list[str]) -> tuple[str, str | None]:
    matcher = StopMatcher(stops)
    emitted = ""
    for piece in pieces:
        new, stop = matcher.push(piece)
        emitted += new
        if stop is not None:
            return emitted, stop
    return emitted + matcher.finish(), None


@given(text=TEXTS, stops=STOPS, data=st.data())
def test_any_cuts_give_the_same(text: str, stops: list[str], data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    borders = [0, *cuts, len(text)]
    pieces = [text[a:b] for a, b in itertools.pairwise(borders)]
    expected = oracle(text, stops)
    assert run(pieces, stops) == expected
    assert run(list(text), stops) == expected


@given(text=TEXTS, stops=STOPS)
def test_no_more_is_held_than_could_become_a_stop(text: str, stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    _, stop = matcher.push(text)
    if stop is None:
        suffixes = [text[i:] for i in range(len(text))]
        begins = [s for s in suffixes if any(stop.startswith(s) for stop in stops)]
        assert matcher.held == max(begins, key=len, default="")


@pytest.mark.parametrize(
    ("stops", "pieces", "expected"),
    [
        (["END"], ["the E", "N", "D and"], ("the ", "END")),
        (["END"], ["the E", "N", "d"], ("the ENd", None)),
        (["abcd", "bc"], ["abcd"], ("a", "bc")),  # complete first
        (["bc", "abc"], ["xabc"], ("x", "abc")),  # complete together: the longest
        (["aab"], ["aa", "aab"], ("aa", "aab")),
        ([], ["abc"], ("abc", None)),
        (["\n\n"], ["a\n", "b\n", "\nc"], ("a\nb", "\n\n")),
    ],
)
def test_matches(stops: list[str], pieces: list[str], expected: tuple[str, str | None]) -> None:
    assert run(pieces, stops) == expected
