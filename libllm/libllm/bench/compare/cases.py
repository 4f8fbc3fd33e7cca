"""What is compared, and how a time becomes a rate.  Pure.

Decode: so many streams with a prompt each; the time for `output` tokens less that for one token
each, so that prefill is not in it.  Prefill: one stream, one token.
"""

import statistics
from collections.abc import Mapping, Sequence
from typing import Final

import msgspec
from llmproto.errors import invalid


class Case(msgspec.Struct, frozen=True):
    """One comparison."""

    name: str
    streams: int
    prompt: int
    output: int
    """1: prefill alone."""

    @property
    def is_prefill(self) -> bool:
        return self.output == 1

    def rate(self, seconds: float, seconds_first: float) -> float:
        """Tokens a second; `seconds_first` is the time for one token a stream."""
        if self.is_prefill:
            return self.streams * self.prompt / seconds_first
        return self.streams * (self.output - 1) / max(seconds - seconds_first, 1e-9)


CASES: Final = {
    case.name: case
    for case in (
        Case("decode-1", 1, 128, 128),
        Case("decode-8", 8, 128, 128),
        Case("decode-32", 32, 128, 128),
        Case("prefill-512", 1, 512, 1),
        Case("prefill-2048", 1, 2048, 1),
    )
}


def cases_of(names: str) -> list[Case]:
    """By their names, joined by commas; `STREAMSxPROMPT+OUTPUT` is a case too."""
    return [CASES[name] if name in CASES else _read(name) for name in names.split(",")]


def _read(text: str) -> Case:
    streams, _, rest = text.partition("x")
    prompt, _, output = rest.partition("+")
    try:
        found = Case(text, int(streams), int(prompt), int(output))
    except ValueError:
        found = Case(text, 0, 0, 0)
    if min(found.streams, found.prompt, found.output) < 1:
        raise invalid(
            f"{text!r} is no case: there is {', '.join(CASES)}, and STREAMSxPROMPT+OUTPUT"
        )
    return found


class Result(msgspec.Struct, frozen=True):
    """One case of one peer, over all rounds."""

    tokens_per_s: float
    """Median."""
    low: float
    high: float
    ratio: float | None = None
    """Ours over theirs, pair by pair, the median; absent for ours."""
    ratio_low: float | None = None
    ratio_high: float | None = None


def results(rates: Mapping[str, Sequence[float]], ours: str) -> dict[str, Result]:
    """By peer; rates of one round stand at the same place in every list."""
    found = {}
    for name, theirs in rates.items():
        middle = (statistics.median(theirs), min(theirs), max(theirs))
        if name == ours:
            found[name] = Result(*middle)
            continue
        pairs = [a / b for a, b in zip(rates[ours], theirs)]
        found[name] = Result(*middle, statistics.median(pairs), min(pairs), max(pairs))
    return found
