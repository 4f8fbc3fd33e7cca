"""Loads of requests that are the same whenever they are made, and what must come of them.

In exact mode a stream is a function of its request: its *twin* is what came when nobody disturbed
it, and is computed once for all tests.
"""

import asyncio
from collections.abc import Sequence
from typing import Final

import msgspec
from libllm.client import AsyncClient
from libllm.generation import Generation
from libllm.options import Options
from libllm.results import Choice, Completion, Gathering, completion

PROMPTS: Final = (
    "The for statement",
    "A list is",
    "The `import` statement",
    "Return the",
    "Strings are",
    "class Counter",
    "If an exception",
    "This method",
)
STOP: Final = " of the"


class Ask(msgspec.Struct, frozen=True):
    """One request."""

    prompt: str
    tokens: int
    seed: int
    temperature: float = 0.0
    choices: int = 1
    stop: str | None = None
    logprobs: int | None = 2
    """Absent: no ids either, as most clients ask."""
    resumable: bool = False

    @property
    def options(self) -> Options:
        """As keywords of `generate`."""
        options = Options(
            max_tokens=self.tokens,
            temperature=self.temperature,
            seed=self.seed,
            ignore_eos=True,
            n=self.choices,
            logprobs=self.logprobs,
            resumable=self.resumable,
        )
        if self.stop is not None:
            options["stop"] = self.stop
        return options


def load(count: int, tokens: int) -> list[Ask]:
    """So many requests: greedy and sampled, some of several choices, some with a stop string, some
    without log-probabilities."""
    return [
        Ask(
            prompt=PROMPTS[number % len(PROMPTS)] + " " * (number // len(PROMPTS)),
            tokens=tokens // 2 if number % 8 == 2 else tokens,
            seed=number,
            temperature=0.0 if number % 2 else 0.8,
            choices=2 if number % 8 == 2 else 1,
            stop=STOP if number % 8 in (4, 5) else None,
            logprobs=None if number % 4 == 3 else 2,
        )
        for number in range(count)
    ]


async def read(generation: Generation) -> Completion:
    """To its end; asserts that its offsets have neither gap nor overlap."""
    gatherings = {stream: Gathering(index) for index, stream in enumerate(generation.streams)}
    offsets = dict.fromkeys(generation.streams, 0)
    while pieces := await generation.take():
        for piece in pieces:
            gatherings[piece.stream].add(piece)
            offsets[piece.stream] += len(piece.text.encode())
            assert piece.offset == offsets[piece.stream], (piece, offsets[piece.stream])
    return completion(list(gatherings.values()), generation.model)


async def complete(client: AsyncClient, ask: Ask) -> Completion:
    """The whole answer, read as a stream."""
    return await read(await client.generate(ask.prompt, stream=True, **ask.options))


async def complete_all(client: AsyncClient, asks: Sequence[Ask]) -> list[Completion]:
    """All at once."""
    return list(await asyncio.gather(*(complete(client, ask) for ask in asks)))


async def under_way(
    client: AsyncClient, asks: Sequence[Ask], tokens: int = 100
) -> "asyncio.Task[list[Completion]]":
    """All at once; returns when so many tokens are committed and more are to come."""
    before = (await client.status()).tokens_committed
    running = asyncio.create_task(complete_all(client, asks))
    committed = 0
    while committed < tokens:
        committed = (await client.status()).tokens_committed - before
        if running.done():
            raise AssertionError(f"over after {committed} tokens: {await running}")
    return running


class Twins:
    """What comes when nobody disturbs it."""

    def __init__(self) -> None:
        self._known: dict[Ask, Completion] = {}

    async def of(self, client: AsyncClient, asks: Sequence[Ask]) -> list[Completion]:
        """Of each; those not known yet are asked for now, of a system at peace."""
        unknown = [ask for ask in dict.fromkeys(asks) if ask not in self._known]
        found = await complete_all(client, unknown)
        self._known.update(zip(unknown, found, strict=True))
        return [self._known[ask] for ask in asks]


def assert_equal(found: Sequence[Completion], twins: Sequence[Completion]) -> None:
    """Every stream is its undisturbed twin's, token for token."""
    for number, (one, twin) in enumerate(zip(found, twins, strict=True)):
        for ours, theirs in zip(one.choices, twin.choices, strict=True):
            where = f"stream {number}.{ours.index}"
            if ours.tokens != theirs.tokens:
                raise AssertionError(f"{where} {_difference(ours, theirs)}")
            assert ours.text == theirs.text, (where, ours.text, theirs.text)
            assert ours.finish_reason == theirs.finish_reason, where
            assert ours.stop == theirs.stop, where
            assert ours.scores == theirs.scores, f"{where}: other scores"
        assert one.usage == twin.usage


def _difference(ours: Choice, theirs: Choice) -> str:
    """Position, tokens, and by how much the twin preferred its own."""
    mine, wanted = ours.tokens or [], theirs.tokens or []
    differing = [at for at, (a, b) in enumerate(zip(mine, wanted)) if a != b]
    at = differing[0] if differing else min(len(mine), len(wanted))
    margin = "unknown"
    if theirs.scores is not None and at < len(theirs.scores):
        best = sorted(theirs.scores[at].top_logprobs, reverse=True)
        margin = f"{best[0] - best[1]:.6f}" if len(best) > 1 else "unknown"
    return (
        f"differs at output token {at}; {len(mine)} tokens came for {len(wanted)}: "
        f"{mine[at : at + 5]} for {wanted[at : at + 5]}, the twin's top-2 margin is {margin}"
    )
