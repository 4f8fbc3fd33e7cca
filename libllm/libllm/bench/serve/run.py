"""One run: warm-up, the load from one process or several, the summary."""

import asyncio
import os
import sys
import time
from collections.abc import Sequence
from typing import Final

import msgspec
from llmproto.errors import ErrorKind, RemoteError

from libllm.bench.serve.servers import Target
from libllm.bench.serve.timeline import INTERACTIVE, SERVER, Limits, Summary, Timeline, summarize
from libllm.bench.serve.worker import Job, work
from libllm.bench.serve.workload import Ask
from libllm.config import child_environment

STREAMS_A_PROCESS: Final = 64
"""Streams that one process reads without being late on a slow core."""
START_S: Final = 2.0
"""From the decision to start several processes until all of them are connected."""


def processes_for(asks: Sequence[Ask], concurrency: int | None, cores: int) -> int:
    """How many processes the load takes; never more than half of the cores, which the server
    needs."""
    streams = concurrency if concurrency is not None else min(len(asks), 256)
    return max(1, min(-(-streams // STREAMS_A_PROCESS), cores // 2))


async def run_load(
    target: Target,
    asks: Sequence[Ask],
    *,
    concurrency: int | None,
    warm_up: Sequence[Ask] = (),
    processes: int | None = None,
    limits: Sequence[Limits] = (SERVER, INTERACTIVE),
    give_up_s: float | None = None,
) -> tuple[Summary, list[Timeline]]:
    """Send everything, and say what it came to; of an open loop, what is unanswered `give_up_s`
    after the beginning counts as failed.  INVALID where the warm-up fails."""
    if warm_up:
        lines = await work(Job(target, list(warm_up), len(warm_up), time.monotonic()))
        failed = [line.error for line in lines if line.error]
        if failed:
            raise RemoteError(ErrorKind.INVALID, f"the warm-up failed: {failed[0]}")
    wanted = processes or processes_for(asks, concurrency, os.cpu_count() or 1)
    wanted = max(1, min(wanted, concurrency or wanted, len(asks) or 1))
    if wanted == 1:
        lines = await work(Job(target, list(asks), concurrency, time.monotonic(), give_up_s))
    else:
        begin_s = time.monotonic() + START_S
        shares = [
            None if concurrency is None else concurrency // wanted + (n < concurrency % wanted)
            for n in range(wanted)
        ]
        jobs = [
            Job(target, list(asks[n::wanted]), share, begin_s, give_up_s)
            for n, share in enumerate(shares)
        ]
        lines = [line for part in await asyncio.gather(*map(_elsewhere, jobs)) for line in part]
    lines.sort(key=lambda line: line.number)
    return summarize(lines, limits), lines


async def _elsewhere(job: Job) -> list[Timeline]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "libllm.bench.serve.worker"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env=child_environment(),
    )
    output, _ = await process.communicate(msgspec.msgpack.encode(job))
    if process.returncode:
        raise RemoteError(
            ErrorKind.INTERNAL, f"a load process ended with exit code {process.returncode}"
        )
    return msgspec.msgpack.decode(output, type=list[Timeline])
