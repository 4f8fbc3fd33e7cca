"""Embeddings and classifications: how a list of texts becomes calls, and what its caller gets.

A call carries at most ENCODE_INPUTS_MAX inputs and `CALL_BYTES` of text; several are in flight at
once, and results stand in the order of the inputs.
"""

import array
import asyncio
import math
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Final

import msgspec
from llmproto import limits
from llmproto.encoding import Encode, Encoded
from llmproto.errors import invalid

from libllm.port import Port

CALL_BYTES: Final = 128 << 10
"""Of text in one call: no tokenizer makes more tokens of it than a thread may have."""
IN_FLIGHT: Final = 8
"""Calls at once: enough that the executor never waits for the next."""


class Embeddings(msgspec.Struct, frozen=True):
    """One vector for each input; indexing and iterating give the vectors."""

    vectors: list["array.array[float]"]
    """float32 each."""
    tokens: int
    """Of all inputs together, special ones included."""
    model: str
    """The resolved name."""
    truncated: list[int] = []
    """Which inputs were cut."""

    def __len__(self) -> int:
        return len(self.vectors)

    def __getitem__(self, index: int) -> "array.array[float]":
        return self.vectors[index]

    def __iter__(self) -> "Iterator[array.array[float]]":
        return iter(self.vectors)

    @property
    def width(self) -> int:
        """Numbers of each vector."""
        return len(self.vectors[0])


class Classification(msgspec.Struct, frozen=True):
    """What a classifier, or a regression, says of one input."""

    label: str
    """The most likely one; of a regression its only name."""
    score: float
    """Its probability; of a regression the number itself."""
    scores: dict[str, float]
    """Of every label.  They add up to 1 unless several labels may hold at once."""
    tokens: int


class Inputs(msgspec.Struct, frozen=True):
    """What is to be encoded, and how."""

    texts: Sequence[str] | None = None
    pairs: Sequence[str] | None = None
    tokens: Sequence[Sequence[int]] | None = None
    model: str | None = None
    task: str = "embed"
    truncate: bool = False
    priority: int = 0
    service_class: int = 1

    def __len__(self) -> int:
        return len(self.texts if self.texts is not None else self.tokens or ())


class Part(msgspec.Struct, frozen=True):
    """The answer to one call."""

    answer: Encoded
    numbers: "array.array[float]"


def inputs_of(
    given: str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]],
) -> tuple[list[str] | None, list[list[int]] | None]:
    """(texts, tokens): one of them, whatever shape the caller gave; INVALID for an empty or mixed
    list."""
    if isinstance(given, str):
        return [given], None
    texts: list[str] = []
    numbers: list[int] = []
    lists: list[list[int]] = []
    for item in given:
        if isinstance(item, str):
            texts.append(item)
        elif isinstance(item, int):
            numbers.append(item)
        else:
            lists.append(list(item))
    kinds = [kind for kind in (texts, numbers, lists) if kind]
    if not kinds:
        raise invalid("there is nothing to encode: the list is empty")
    if len(kinds) > 1:
        raise invalid("texts and token ids are mixed: send one kind")
    return (texts, None) if texts else (None, lists or [numbers])


def calls(inputs: Inputs) -> list[Encode]:
    """The inputs as calls, in order, each with a key of its own."""
    sizes = [_bytes_of(inputs, number) for number in range(len(inputs))]
    made: list[Encode] = []
    start = size = 0
    for number, more in enumerate(sizes):
        full = number - start == limits.ENCODE_INPUTS_MAX
        if number > start and (full or size + more > CALL_BYTES):
            made.append(_call(inputs, start, number))
            start, size = number, 0
        size += more
    made.append(_call(inputs, start, len(sizes)))
    return made


async def encode_all(
    port: Port,
    inputs: Inputs,
    *,
    tenant: int | None = None,
    deadline_ns: int | None = None,
    wait: bool = False,
) -> list[Part]:
    """Every call's answer, in order; the first refusal ends the others."""
    room = asyncio.Semaphore(IN_FLIGHT)

    async def one(call: Encode) -> Part:
        async with room:
            reply = await port.exchange(
                call,
                Encoded,
                target="tokenizer",
                tenant=tenant,
                deadline_ns=deadline_ns,
                wait_exhausted=wait,
            )
        return Part(reply.message, _floats(reply.blobs[0]))

    tasks = [asyncio.create_task(one(call)) for call in calls(inputs)]
    try:
        return list(await asyncio.gather(*tasks))
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        raise


def embeddings(parts: Sequence[Part], *, dimensions: int | None) -> Embeddings:
    """The vectors; with `dimensions` only so many numbers of each, brought back to length 1."""
    width = parts[0].answer.width
    if dimensions is not None and not 1 <= dimensions <= width:
        raise invalid(f"{dimensions} dimensions are asked for; the model gives {width}")
    vectors: list[array.array[float]] = []
    truncated: list[int] = []
    for part in parts:
        truncated += [len(vectors) + number for number in part.answer.truncated]
        rows = range(0, len(part.numbers), width)
        if dimensions is None:
            vectors += [part.numbers[row : row + width] for row in rows]
        else:
            vectors += [_shortened(part.numbers[row : row + dimensions]) for row in rows]
    tokens = sum(sum(part.answer.tokens) for part in parts)
    return Embeddings(vectors, tokens, parts[0].answer.model, truncated)


def classifications(parts: Sequence[Part]) -> list[Classification]:
    """Logits as scores: softmax where one label holds, sigmoid where several may, and of a
    regression as they are."""
    made: list[Classification] = []
    for part in parts:
        answer = part.answer
        for number, tokens in enumerate(answer.tokens):
            logits = part.numbers[number * answer.width : (number + 1) * answer.width]
            scores = dict(zip(answer.labels, _scores(logits, answer.problem)))
            best = max(scores, key=lambda label: scores[label])
            made.append(Classification(best, scores[best], scores, tokens))
    return made


def _scores(logits: Sequence[float], problem: str) -> list[float]:
    match problem:
        case "single_label":
            highest = max(logits)
            powers = [math.exp(logit - highest) for logit in logits]
            return [power / sum(powers) for power in powers]
        case "multi_label":
            return [_sigmoid(logit) for logit in logits]
        case _:
            return list(logits)


def _sigmoid(logit: float) -> float:
    power = math.exp(-abs(logit))
    return (1.0 if logit >= 0 else power) / (1.0 + power)


def _call(inputs: Inputs, start: int, stop: int) -> Encode:
    texts, pairs, tokens = inputs.texts, inputs.pairs, inputs.tokens
    return Encode(
        key=os.urandom(16),
        model=inputs.model,
        texts=None if texts is None else list(texts[start:stop]),
        pairs=None if pairs is None else list(pairs[start:stop]),
        tokens=None if tokens is None else [list(each) for each in tokens[start:stop]],
        task=inputs.task,
        truncate=inputs.truncate,
        service_class=inputs.service_class,
        priority=inputs.priority,
    )


def _bytes_of(inputs: Inputs, number: int) -> int:
    if inputs.tokens is not None:
        return len(inputs.tokens[number])
    assert inputs.texts is not None
    size = _utf8(inputs.texts[number])
    return size if inputs.pairs is None else size + _utf8(inputs.pairs[number])


def _utf8(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode(errors="surrogatepass"))


def _floats(blob: bytes) -> "array.array[float]":
    numbers = array.array("f")
    numbers.frombytes(blob)
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers


def _shortened(numbers: "array.array[float]") -> "array.array[float]":
    length = math.sqrt(math.fsum(number * number for number in numbers))
    return array.array("f", (number / length for number in numbers)) if length else numbers
