"""`python -m libllm.bench.serve.worker`: a share of a load, in a process of its own.

Reads one Job as MessagePack from stdin to its end, connects, waits for the beginning, runs, and
writes its timelines as MessagePack.
"""

import asyncio
import sys

import msgspec
import uvloop

from libllm.bench.serve.drive import drive
from libllm.bench.serve.servers import Target, connect
from libllm.bench.serve.timeline import Timeline
from libllm.bench.serve.workload import Ask


class Job(msgspec.Struct, frozen=True):
    """What one process has to do."""

    target: Target
    asks: list[Ask]
    concurrency: int | None
    begin_s: float
    give_up_s: float | None = None


async def work(job: Job) -> list[Timeline]:
    """Connect, wait for the beginning, run."""
    server = await connect(job.target)
    try:
        return await drive(
            server,
            job.asks,
            concurrency=job.concurrency,
            begin_s=job.begin_s,
            give_up_s=job.give_up_s,
        )
    finally:
        await server.close()


def main() -> None:
    """The process."""
    job = msgspec.msgpack.decode(sys.stdin.buffer.read(), type=Job)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        lines = runner.run(work(job))
    sys.stdout.buffer.write(msgspec.msgpack.encode(lines))


if __name__ == "__main__":
    main()
