"""What is asked, and when: requests made from numbers or from a recorded trace.

Pure: one seed, one workload.  Prompts are token ids; no two begin alike unless the trace says so,
and no cache answers what was to be computed.
"""

import csv
import json
import math
import random
from collections.abc import Iterator
from datetime import datetime
from itertools import islice, takewhile
from pathlib import Path
from typing import Annotated, Final, TextIO

import msgspec
from llmproto.errors import RemoteError, invalid
from msgspec import Meta

MOONCAKE_BLOCK_TOKENS: Final = 512
"""Tokens behind one hash id.  Source: Mooncake traces, FAST 2025."""
FIRST_ID: Final = 16
"""Ids below are special tokens in most vocabularies."""


class Lengths(msgspec.Struct, frozen=True):
    """Tokens of a prompt or an answer: fixed, or evenly from `low` to `high`."""

    low: Annotated[int, Meta(ge=1)]
    high: Annotated[int, Meta(ge=1)]

    @classmethod
    def read(cls, text: str) -> "Lengths":
        """`128`, or `64:512`; INVALID for anything else."""
        low, _, high = text.partition(":")
        try:
            found = cls(int(low), int(high or low))
        except ValueError:
            raise invalid(f"lengths are a number or LOW:HIGH, not {text!r}") from None
        if not 1 <= found.low <= found.high:
            raise invalid(f"lengths {text!r}: at least 1, and LOW not above HIGH")
        return found

    def draw(self, chance: random.Random) -> int:
        """One of them."""
        return chance.randint(self.low, self.high)


class Ask(msgspec.Struct, frozen=True):
    """One request of a workload."""

    number: int
    at_s: float | None
    """Since the beginning; absent: as soon as a place is free (closed loop)."""
    prompt: list[int]
    output_tokens: int


class Shape(msgspec.Struct, frozen=True):
    """What holds for every request of a workload."""

    vocabulary: Annotated[int, Meta(gt=FIRST_ID)]
    """Ids are drawn from FIRST_ID up to here."""
    seed: int = 0
    prompt_max: int | None = None
    """Longer prompts of a trace are cut to this."""
    output_max: int | None = None


def synthetic(
    count: int, shape: Shape, *, prompt: Lengths, output: Lengths, rate: float | None = None
) -> list[Ask]:
    """Requests of drawn lengths; with a rate (requests a second) they arrive as a Poisson process,
    without one in a closed loop."""
    chance = random.Random(shape.seed)
    asks: list[Ask] = []
    at_s = 0.0
    for number in range(count):
        if rate is not None:
            at_s += chance.expovariate(rate)
        ids = _ids(random.Random(f"{shape.seed}/{number}"), shape, prompt.draw(chance))
        at = None if rate is None else at_s
        asks.append(Ask(number, at, ids, output.draw(chance)))
    return asks


def azure(
    path: Path, count: int, shape: Shape, *, speed: float, until_s: float = math.inf
) -> list[Ask]:
    """Arrivals and lengths of the Azure LLM inference traces (2023), `speed` times as fast: the
    first `count` that arrive before `until_s`."""
    rows = takewhile(lambda ask: (ask.at_s or 0.0) < until_s, _azure(path, shape, speed))
    return list(islice(rows, count))


def _azure(path: Path, shape: Shape, speed: float) -> Iterator[Ask]:
    first: datetime | None = None
    with _opened(path) as file:
        for number, row in enumerate(csv.DictReader(file)):
            try:
                # Seven digits of a second, one more than Python reads.
                at = datetime.fromisoformat(row["TIMESTAMP"][:26])
                prompt, output = int(row["ContextTokens"]), int(row["GeneratedTokens"])
            except (KeyError, ValueError) as error:
                raise _malformed(path, number + 2, error) from None
            first = first or at
            ids = _ids(random.Random(f"{shape.seed}/{number}"), shape, _cut(prompt, shape))
            at_s = (at - first).total_seconds() / speed
            yield Ask(number, at_s, ids, _output(output, shape))


def mooncake(path: Path, count: int, shape: Shape, *, speed: float, block_tokens: int) -> list[Ask]:
    """Arrivals, lengths and shared prefixes of the Mooncake traces: every hash id becomes the same
    `block_tokens` ids wherever it stands (the trace's own blocks have MOONCAKE_BLOCK_TOKENS)."""
    return list(islice(_mooncake(path, shape, speed, block_tokens), count))


def _mooncake(path: Path, shape: Shape, speed: float, block_tokens: int) -> Iterator[Ask]:
    scale = block_tokens / MOONCAKE_BLOCK_TOKENS
    blocks: dict[int, list[int]] = {}
    whole = msgspec.structs.replace(shape, prompt_max=None)
    with _opened(path) as file:
        for number, line in enumerate(file):
            try:
                row = json.loads(line)
                at_ms, prompt, output = row["timestamp"], row["input_length"], row["output_length"]
                hashes = [int(one) for one in row["hash_ids"]]
                tokens = _cut(max(1, round(int(prompt) * scale)), shape)
                at_s = float(at_ms) / 1000 / speed
                wanted = _output(max(1, round(int(output) * scale)), shape)
            except (KeyError, TypeError, ValueError) as error:
                raise _malformed(path, number + 1, error) from None
            ids: list[int] = []
            for one in hashes:
                if one not in blocks:
                    chance = random.Random(f"{shape.seed}/{one}")
                    blocks[one] = _ids(chance, whole, block_tokens)
                ids += blocks[one]
            yield Ask(number, at_s, ids[:tokens], wanted)


def reusable_tokens(asks: list[Ask], block_tokens: int) -> int:
    """Prompt tokens that an unbounded prefix cache would not compute again, in whole blocks."""
    seen: set[int] = set()
    found = 0
    for ask in asks:
        leading = 0
        for end in range(block_tokens, len(ask.prompt) + 1, block_tokens):
            key = hash(tuple(ask.prompt[:end]))
            if key in seen and leading == end - block_tokens:
                leading = end
            seen.add(key)
        found += leading
    return found


def _ids(chance: random.Random, shape: Shape, tokens: int) -> list[int]:
    return chance.choices(range(FIRST_ID, shape.vocabulary), k=tokens)


def _cut(prompt_tokens: int, shape: Shape) -> int:
    return max(1, min(prompt_tokens, shape.prompt_max or prompt_tokens))


def _output(output_tokens: int, shape: Shape) -> int:
    return max(1, min(output_tokens, shape.output_max or output_tokens))


def _opened(path: Path) -> TextIO:
    try:
        return path.open(encoding="utf-8", newline="")
    except OSError as error:
        raise invalid(f"{path}: cannot be read ({error.strerror})") from None


def _malformed(path: Path, line: int, error: Exception) -> RemoteError:
    return invalid(f"{path}, line {line}: not a row of this trace ({error!r})")
