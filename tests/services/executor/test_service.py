"""The executor's messages, with a tiny model, a port that keeps what is sent, and a real step
thread."""

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import pytest
from libllm.config import ExecutorConfig
from libllm.crashnotes import read_note
from libllm.events import Event, Post
from libllm.port import Port
from libllm.service import Request
from llmproto import limits, wire
from llmproto.base import Header, Message
from llmproto.connection import Beat, Working
from llmproto.encoding import Vectors
from llmproto.errors import ErrorKind, RemoteError
from llmproto.execution import (
    Drop,
    ExecutorReady,
    GaveBack,
    LoadFailed,
    Refused,
    Resync,
    Run,
    Stepped,
)
from llmproto.generation import Sampling
from llmproto.metrics import Metrics
from llmproto.threads import Committed
from llmservices.executor.core import Engine
from llmservices.executor.loader import Settings
from llmservices.executor.service import Executor, in_a_thread

from ..encoders import make

M = TypeVar("M", bound=Message)
PROMPT = [5, 7, 11]


class Desk:
    """One executor, and what it has said."""

    def __init__(self, folder: Path, home: Path, **config: Any) -> None:  # ExecutorConfig's fields
        self.said: list[Message] = []
        self.blobs: list[tuple[bytes, ...]] = []
        """Of each message ever said."""
        self.came = asyncio.Event()
        self.port = Port(self._take)
        merged = {"mode": "exact", "threads": 1, "residents_max": 4, **config}
        settings = Settings("tiny", folder, b"d" * 16, "cpu0", [0], ExecutorConfig(**merged))
        self.note = home / "note"
        self.executor = Executor(
            self.port, settings, self.note, process="executor-1", incarnation=2
        )
        self.request = Request(Header(1, 0x0302, b"i" * 16), self.port)
        self.steps: dict[int, list[int]] = {}
        """Residency -> tokens proposed, each position once."""

    def _take(self, event: Event) -> None:
        assert isinstance(event, Post)
        self.said.append(event.message)
        self.blobs.append(event.blobs)
        self.came.set()

    async def next(self, kind: type[M], *, of: Callable[[M], bool] = lambda m: True) -> M:
        """Wait for a message; earlier ones are left out."""
        while True:
            while self.said:
                message = self.said.pop(0)
                if isinstance(message, kind) and of(message):
                    return message
            self.came.clear()
            await self.came.wait()

    def run(self, residency: int = 1, **changes: Any) -> None:  # Run's fields
        run = Run(
            thread=b"thread%02d" % residency,
            residency=residency,
            tokens=wire.pack_tokens(PROMPT),
            prompt_tokens=len(PROMPT),
            output_tokens_max=20,
            sampling=Sampling(temperature=0.0, ignore_eos=True),
            service_class=1,
            priority=0,
            domain=bytes(16),
        )
        self.executor.run(msgspec.structs.replace(run, **changes), self.request)

    def mark(self, residency: int, position: int) -> None:
        mark = Committed([b"thread%02d" % residency], [position], [], [])
        self.executor.committed(mark, self.request)

    async def generate(self, residency: int, last: int) -> list[tuple[int, int | None, int]]:
        """(position, token, end) up to that position, committing each."""
        found: dict[int, tuple[int | None, int]] = {}
        while last not in found:
            step = await self.next(Stepped)
            for r, position, token, end in zip(
                step.residencies, step.positions, step.tokens, step.ends
            ):
                if r == residency:
                    found.setdefault(position, (token, end))
                    self.mark(residency, position)
        return [(position, *row) for position, row in sorted(found.items())]


@pytest.fixture
async def desk(tiny_folder: Path, tmp_path: Path) -> AsyncIterator[Desk]:
    made = Desk(tiny_folder, tmp_path)
    await made.executor.start()
    await made.next(ExecutorReady)
    yield made
    await made.executor.drain()


async def test_it_says_what_it_is(tiny_folder: Path, tmp_path: Path) -> None:
    desk = Desk(tiny_folder, tmp_path)
    assert desk.executor.holding().progress == 0
    desk.run()  # too early: the kernel repeats it
    await desk.executor.start()
    kinds = [type(message) for message in desk.said]
    assert kinds == [Working, ExecutorReady, Beat, Working, Metrics]
    assert desk.said[0] == Working("loading", limits.WORKING_MS_MAX)
    assert desk.said[3] == Working("loading", 0)
    ready = desk.said[1]
    assert isinstance(ready, ExecutorReady)
    assert (ready.model, ready.digest, ready.context_tokens) == ("tiny", b"d" * 16, 160)
    assert ready.path.startswith(("float32 cpu native ", "float32 cpu torch exact (native step "))
    assert desk.executor.holding().threads == []
    assert set(desk.executor.handlers()) == {Committed, Run, Drop, Resync}
    await desk.executor.drain()


async def test_a_run_is_stepped_to_its_end_and_forgotten_when_that_is_committed(desk: Desk) -> None:
    desk.run()
    assert desk.executor.holding().threads == [b"thread01"]
    rows = await desk.generate(1, 22)
    assert [position for position, _, _ in rows] == list(range(3, 23))
    assert [end for _, _, end in rows] == [0] * 19 + [2]
    assert desk.executor.holding().threads == []
    desk.run()  # the same residency is over, but the engine may take it anew
    again = await desk.generate(1, 22)
    assert again == rows


async def test_a_repeated_run_changes_nothing(desk: Desk) -> None:
    desk.run()
    desk.run()
    rows = await desk.generate(1, 22)
    assert len(rows) == 20
    assert not any(isinstance(message, Refused | GaveBack) for message in desk.said)


async def test_it_waits_for_the_watermark(desk: Desk) -> None:
    desk.run()
    last = 2 + limits.STEPS_AHEAD_MAX
    await desk.next(Stepped, of=lambda step: step.positions[-1] == last)
    desk.mark(1, 3)
    assert (await desk.next(Stepped)).positions == [last + 1]


async def test_it_says_again_what_was_lost(desk: Desk) -> None:
    desk.run()
    last = 2 + limits.STEPS_AHEAD_MAX
    await desk.next(Stepped, of=lambda step: step.positions[-1] == last)
    desk.executor.resync(Resync(b"thread01", 1, 5), desk.request)
    assert (await desk.next(Stepped)).positions == list(range(5, last + 1))
    desk.executor.welcomed()
    assert isinstance(desk.said[0], ExecutorReady)
    beat = await desk.next(Beat)
    assert (beat.threads, beat.positions) == ([b"thread01"], [1])
    assert (await desk.next(Stepped)).positions == list(range(3, last + 1))
    # And by itself, where nothing is heard for long.
    assert (await desk.next(Stepped)).positions == list(range(3, last + 1))


async def test_a_drop_ends_it(desk: Desk) -> None:
    desk.run(1)
    desk.run(2)
    await desk.next(Stepped)
    desk.executor.drop(Drop([1, 77]), desk.request)
    assert desk.executor.holding().threads == [b"thread02"]
    await desk.generate(2, 22)
    ready = desk.executor
    assert ready._engine is not None
    assert ready._engine.residencies() in ([], [2])


async def test_a_thread_that_can_never_run_is_refused(desk: Desk) -> None:
    desk.run(tokens=wire.pack_tokens([5, 100_000, 11]))
    refused = await desk.next(Refused)
    assert (refused.thread, refused.residency, refused.kind) == (b"thread01", 1, ErrorKind.INVALID)
    assert "100000" in refused.detail
    assert desk.executor.holding().threads == []


async def test_more_than_it_takes_is_given_back(desk: Desk) -> None:
    for residency in range(1, 6):
        desk.run(residency)
    gave_back = await desk.next(GaveBack)
    assert (gave_back.threads, gave_back.residencies) == ([b"thread05"], [5])
    assert len(desk.executor.holding().threads) == 4


async def test_without_blocks_the_youngest_is_given_back(tiny_folder: Path, tmp_path: Path) -> None:
    block_bytes = 2 * 2 * 2 * 8 * 16 * 4  # layers, keys and values, heads, width, tokens, float32
    desk = Desk(tiny_folder, tmp_path, kv_bytes=4 * block_bytes, step="torch")
    await desk.executor.start()
    desk.run(1, output_tokens_max=55)
    desk.run(2, output_tokens_max=55)
    gave_back: list[int] = []
    position = {1: 2, 2: 2}
    while not gave_back:
        message = await desk.next(Message)
        if isinstance(message, GaveBack):
            gave_back = message.residencies
        elif isinstance(message, Stepped):
            for residency, at in zip(message.residencies, message.positions):
                position[residency] = at
                desk.mark(residency, at)
    assert gave_back == [2]
    assert desk.executor.holding().threads == [b"thread01"]
    await desk.executor.drain()


async def test_vectors_are_kept_until_the_kernel_has_them(tmp_path: Path) -> None:
    folder, _ = make(tmp_path / "encoder")
    desk = Desk(folder, tmp_path)
    await desk.executor.start()
    ready = await desk.next(ExecutorReady, of=lambda ready: bool(ready.path))
    assert (ready.context_tokens, ready.path) == (34, "float32 cpu torch encoder exact")
    desk.run(tokens=wire.pack_tokens([5, 6, 7]), lengths=[1, 2], output_tokens_max=0)
    first = await desk.next(Vectors)
    assert (first.residencies, first.offsets, first.sizes) == ([1], [0], [2 * 24 * 4])
    assert [len(blob) for blob in desk.blobs[-1]] == [2 * 24 * 4]
    assert read_note(desk.note) == []
    desk.executor.resync(Resync(b"thread01", 1, 3), desk.request)
    assert await desk.next(Vectors) == first
    desk.executor.welcomed()
    assert await desk.next(Vectors) == first
    assert desk.executor.holding().positions == [1]
    desk.executor.drop(Drop([1]), desk.request)
    assert desk.executor.holding().positions == []
    desk.run(2, tokens=wire.pack_tokens([5] * 35), lengths=[35], output_tokens_max=0)
    refused = await desk.next(Refused)
    assert (refused.residency, refused.kind) == (2, ErrorKind.INVALID)
    await desk.executor.drain()


async def test_inputs_are_nothing_for_a_model_that_generates(desk: Desk) -> None:
    desk.run(lengths=[3], output_tokens_max=0)
    assert "this model generates text" in (await desk.next(Refused)).detail


async def test_a_broken_folder_is_said_at_every_welcome(tmp_path: Path) -> None:
    desk = Desk(tmp_path / "none", tmp_path)
    starting = asyncio.create_task(desk.executor.start())
    failed = await desk.next(LoadFailed)
    assert (failed.model, failed.kind) == ("tiny", ErrorKind.INVALID)
    desk.executor.welcomed()  # the connection stands only now
    assert await desk.next(LoadFailed) == failed
    assert not starting.done()
    starting.cancel()
    await asyncio.wait([starting])


async def test_every_step_is_progress(desk: Desk) -> None:
    # The steps of a long prefill propose nothing, and the process lives.
    before = desk.executor.holding().progress
    desk.run()
    await desk.generate(1, 22)
    assert desk.executor.holding().progress >= before + 20


async def test_the_note_names_what_is_computed_and_nothing_afterwards(desk: Desk) -> None:
    engine = desk.executor._engine
    assert isinstance(engine, Engine)
    noted: list[list[tuple[bytes, int]]] = []
    compute = engine._runner.compute

    def looking(works: Any) -> Any:  # the runner's own types
        noted.append(read_note(desk.note))
        return compute(works)

    engine._runner.compute = looking  # type: ignore[method-assign]
    desk.run()
    await desk.generate(1, 22)
    assert noted[:2] == [[(b"thread01", 3)], [(b"thread01", 4)]]
    assert read_note(desk.note) == []


async def test_an_idle_step_thread_takes_no_time(desk: Desk) -> None:
    desk.run()
    await desk.generate(1, 22)
    loop = desk.executor._loop
    assert loop is not None
    steps = loop._thread
    assert steps.native_id is not None
    stat = Path(f"/proc/{os.getpid()}/task/{steps.native_id}/stat")

    def sleeps() -> bool:
        return not stat.exists() or stat.read_text().rsplit(")", 1)[1].split()[0] == "S"

    # With nothing to be committed it sleeps without a timeout, until something is ordered.
    while loop._orders or loop._proposed or loop._prefilling or not sleeps():  # noqa: ASYNC110
        await asyncio.sleep(0)
    assert loop._ends == {}


async def test_what_breaks_the_step_thread_breaks_the_process(desk: Desk) -> None:
    engine = desk.executor._engine
    assert isinstance(engine, Engine)
    raised: asyncio.Future[BaseException] = asyncio.get_running_loop().create_future()
    asyncio.get_running_loop().set_exception_handler(
        lambda _, context: raised.set_result(context["exception"])
    )

    def broken(works: object) -> None:
        raise ValueError("an invariant broke")

    engine._runner.compute = broken  # type: ignore[method-assign]
    desk.run()
    assert str(await raised) == "an invariant broke"
    assert read_note(desk.note) == [(b"thread01", 3)]


async def test_measurements(desk: Desk) -> None:
    desk.run()
    await desk.generate(1, 22)
    report = desk.executor._metrics()
    assert (report.process, report.incarnation) == ("executor-1", 2)
    counters = {sample.name: sample.value for sample in report.counters}
    assert counters["llmos_executor_tokens_total"] >= 20
    (steps,) = report.histograms
    assert sum(steps.counts) >= 20


async def test_what_loads_is_gone_when_the_steps_begin() -> None:
    """A thread that has computed and lives on would slow down every step."""
    inside: list[threading.Thread] = []

    def load() -> str:
        inside.append(threading.current_thread())
        return "loaded"

    def fail() -> str:
        raise RemoteError(ErrorKind.INVALID, "no model")

    assert await in_a_thread(load) == "loaded"
    assert inside[0] is not threading.main_thread()
    inside[0].join(10)
    assert not inside[0].is_alive()
    with pytest.raises(RemoteError, match="no model"):
        await in_a_thread(fail)
