"""Sends a workload to a server, on time, and notes what came back when.

Invariant: in an open loop a request is sent when it is due, whatever became of those before it (a
slow server must not slow its own load); in a closed loop so many are in flight, never more.  What
is unanswered when the run gives up counts as failed.
"""

import asyncio
import time
from collections.abc import Iterator, Sequence
from typing import Final

import aiohttp
from llmproto.errors import RemoteError

from libllm.bench.serve.servers import Server, reason
from libllm.bench.serve.timeline import Timeline
from libllm.bench.serve.workload import Ask

IN_FLIGHT_MAX: Final = 8192
"""Requests of an open loop that are unanswered at once; more are counted as failed, not sent: a
server that far behind has been measured."""

FAILURES: Final = (RemoteError, aiohttp.ClientError, OSError, RuntimeError, ValueError, KeyError)
"""What a server, its absence, or its answer can come to."""


async def drive(
    server: Server,
    asks: Sequence[Ask],
    *,
    concurrency: int | None,
    begin_s: float,
    give_up_s: float | None = None,
) -> list[Timeline]:
    """One timeline for each ask.  `begin_s` (of time.monotonic) is when the run begins, the same
    for every process that takes part in it; so long after it an open loop waits for nothing."""
    clock = _Clock(begin_s)
    await asyncio.sleep(max(0.0, -clock()))
    if concurrency is not None:
        return await _closed(server, asks, concurrency, clock)
    return await _open(server, asks, clock, give_up_s)


class _Clock:
    def __init__(self, begin_s: float) -> None:
        self._begin_s = begin_s

    def __call__(self) -> float:
        return time.monotonic() - self._begin_s

    async def reach(self, at_s: float) -> None:
        """Wait until then; a timer may fire early."""
        while (ahead_s := at_s - self()) > 0:  # noqa: ASYNC110 - a time is waited for, no event
            await asyncio.sleep(ahead_s)


async def _closed(
    server: Server, asks: Sequence[Ask], concurrency: int, clock: _Clock
) -> list[Timeline]:
    left: Iterator[Ask] = iter(asks)
    lines: list[Timeline] = []

    async def place() -> None:
        for ask in left:
            line = Timeline(ask.number, len(ask.prompt), clock(), arrivals_s=[])
            await _one(server, ask, line, clock)
            lines.append(line)

    await asyncio.gather(*(place() for _ in range(min(concurrency, len(asks)))))
    return lines


async def _open(
    server: Server, asks: Sequence[Ask], clock: _Clock, give_up_s: float | None
) -> list[Timeline]:
    running: dict[asyncio.Task[None], Timeline] = {}
    lines: list[Timeline] = []

    def over(task: "asyncio.Task[None]") -> None:
        line = running.pop(task)
        lines.append(line)
        if task.cancelled():
            line.error, line.ended_s = "given up", clock()
        else:
            task.result()

    for ask in asks:
        due_s = ask.at_s or 0.0
        await clock.reach(due_s)
        line = Timeline(ask.number, len(ask.prompt), due_s, arrivals_s=[])
        if len(running) >= IN_FLIGHT_MAX:
            line.sent_s, line.ended_s = due_s, clock()
            line.error = f"not sent: {IN_FLIGHT_MAX} requests are unanswered"
            lines.append(line)
            continue
        task = asyncio.create_task(_one(server, ask, line, clock))
        running[task] = line
        task.add_done_callback(over)
    if running:
        left_s = None if give_up_s is None else max(0.0, give_up_s - clock())
        _, late = await asyncio.wait(list(running), timeout=left_s)
        for one in late:
            one.cancel()
        if late:
            await asyncio.wait(late)
        await asyncio.sleep(0)  # the callbacks of the last ones
    return lines


async def _one(server: Server, ask: Ask, line: Timeline, clock: _Clock) -> None:
    line.sent_s = clock()
    try:
        await server.answer(ask, line, clock)
        if not line.arrivals_s:
            line.error = "an answer without a token"
    except FAILURES as error:  # a failed request is a result of the measurement
        line.error = reason(error)
    line.ended_s = clock()
