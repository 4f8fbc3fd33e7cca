"""The executor's messages: residencies in, proposals out; all computing is on the step thread."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from itertools import accumulate
from pathlib import Path
from typing import Final, TypeVar

from libllm.crashnotes import CrashNote
from libllm.events import Holding
from libllm.metrics import Reporter
from libllm.port import Port
from libllm.service import Handlers, Request, Service
from llmproto import limits, wire
from llmproto.connection import Beat
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
from llmproto.metrics import Metrics
from llmproto.threads import Committed

from llmservices.executor import steploop
from llmservices.executor.contract import (
    Admission,
    Computed,
    Failure,
    PlanHook,
    Proposal,
    Stepping,
)
from llmservices.executor.costs import StepCosts
from llmservices.executor.loader import Settings, load_engine
from llmservices.executor.measures import Measures
from llmservices.executor.steploop import Report, StepLoop

T = TypeVar("T")
VECTORS_BYTES: Final = limits.MESSAGE_BYTES_MAX // 2
"""Of one message of vectors; a single call may take as much by itself."""


class Executor(Service):
    """One replica of one model."""

    def __init__(
        self, port: Port, settings: Settings, note: Path, *, process: str, incarnation: int
    ) -> None:
        self._port = port
        self._settings = settings
        self._note_path = note
        self._name = (process, incarnation)
        self._measures = Measures()
        self._reporter = Reporter(port, self._metrics)
        self._held: dict[int, bytes] = {}
        """Residency -> thread."""
        self._current: dict[bytes, int] = {}
        """Thread -> its residency here."""
        self._ends: dict[int, int] = {}
        """Residency -> position of its proposed end."""
        self._blocks_free = 0
        self._failure: LoadFailed | None = None
        self._engine: Stepping | None = None
        self._loop: StepLoop | None = None

    def handlers(self) -> Handlers:
        """Every message that an executor takes."""
        return {
            Committed: self.committed,
            Run: self.run,
            Drop: self.drop,
            Resync: self.resync,
        }

    def holding(self) -> Holding:
        """The residencies; every step is progress, those of a long prefill too."""
        progress = 0 if self._engine is None else self._engine.counters.steps + 1
        return Holding(progress, list(self._held.values()), list(self._held))

    async def start(self) -> None:
        """Load the model; without it there is nothing to serve."""
        note = CrashNote(self._note_path)
        costs = StepCosts()
        self.welcomed()
        try:
            hook = self.plan_hook(note)
            engine = await in_a_thread(lambda: load_engine(self._settings, hook, costs))
        except RemoteError as error:
            detail = error.detail[: limits.DETAIL_BYTES_MAX]
            self._failure = LoadFailed(self._settings.model, error.kind, detail)
            self.welcomed()
            await asyncio.Event().wait()  # the kernel stops this process
            raise AssertionError("unreachable") from None
        note.clear()
        self._engine = engine
        self._blocks_free = engine.blocks_free
        self._loop = StepLoop(
            engine,
            note,
            costs,
            report=self._from_thread(self._reported),
            broke=self._from_thread(self._broke),
            working=self._from_thread(self._working),
        )
        self._loop.start()
        self.welcomed()
        self._port.working("loading", budget_ms=0)
        self._reporter.start()

    def plan_hook(self, note: CrashNote) -> PlanHook:
        """What is told of each step before it is computed."""
        return note.write

    def welcomed(self) -> None:
        """The kernel must know what this is, what it holds, and what it proposed.

        Said at each turn of this process too, because the connection may stand before or after it.
        """
        if self._failure is not None:
            self._port.send(self._failure)
            return
        if self._engine is None or self._loop is None:
            self._port.working("loading", budget_ms=limits.WORKING_MS_MAX)
            return
        engine = self._engine
        ready = ExecutorReady(
            model=self._settings.model,
            digest=self._settings.digest,
            context_tokens=engine.context_tokens,
            blocks=engine.blocks,
            block_tokens=engine.config.block_tokens,
            residents_max=engine.config.residents_max,
            path=engine.path,
            memory_bytes=engine.memory_bytes,
        )
        self._port.send(ready)
        held = self.holding()
        self._port.send(Beat(held.progress, held.threads, held.positions))
        self._loop.order(steploop.Resend())

    async def drain(self) -> None:
        """The step that is at work is finished and reported; the kernel has all of it."""
        if self._loop is not None:
            await asyncio.to_thread(self._loop.stop)
        self._reporter.stop()

    def _from_thread(self, call: Callable[[T], None]) -> Callable[[T], None]:
        """The same call, made on the event loop by another thread."""

        def post(value: T) -> None:
            self._port.loop.call_soon_threadsafe(call, value)

        return post

    def _working(self, budget_ms: int) -> None:
        self._port.working("step", budget_ms=budget_ms)

    # --- orders -----------------------------------------------------------------------------------

    def run(self, run: Run, request: Request) -> None:
        """A thread arrives; a repeated Run of a residency that is held changes nothing."""
        if self._loop is None or run.residency in self._held:
            return
        self._held[run.residency] = run.thread
        self._current[run.thread] = run.residency
        admission = Admission(
            thread=run.thread,
            residency=run.residency,
            tokens=wire.unpack_tokens(run.tokens),
            prompt_tokens=run.prompt_tokens,
            output_tokens_max=run.output_tokens_max,
            sampling=run.sampling,
            service_class=run.service_class,
            priority=run.priority,
            domain=run.domain,
            prompt_scores=run.prompt_scores,
            lengths=run.lengths,
            pair_at=run.pair_at,
        )
        self._loop.order(steploop.Add(admission))

    def committed(self, mark: Committed, request: Request) -> None:
        """The watermark has moved."""
        residencies: list[int] = []
        positions: list[int] = []
        for thread, position in zip(mark.threads, mark.positions):
            residency = self._current.get(thread)
            if residency is not None:
                residencies.append(residency)
                positions.append(position)
                if self._ends.get(residency, position + 1) <= position:
                    self._forget(residency)  # the step thread drops it at the same mark
        if residencies and self._loop is not None:
            self._loop.order(steploop.Mark(residencies, positions))

    def drop(self, drop: Drop, request: Request) -> None:
        """Residencies are over."""
        for residency in drop.residencies:
            self._forget(residency)
        if self._loop is not None:
            self._loop.order(steploop.Drop(drop.residencies))

    def resync(self, resync: Resync, request: Request) -> None:
        """Say again what was lost on the way."""
        if self._loop is not None:
            self._loop.order(steploop.Resend(resync.residency, resync.position))

    def _forget(self, residency: int) -> None:
        self._ends.pop(residency, None)
        thread = self._held.pop(residency, None)
        if thread is not None and self._current.get(thread) == residency:
            del self._current[thread]

    # --- reports ----------------------------------------------------------------------------------

    def _reported(self, report: Report) -> None:
        self._blocks_free = report.blocks_free
        for row in report.rows:
            if row.end:
                self._ends[row.residency] = row.position
        if report.rows:
            self._port.send(stepped(report.rows, report.blocks_free))
        for vectors, blob in messages_of(report.vectors):
            self._port.send(vectors, blobs=(blob,))
        self._measures.take(report)
        self._reporter.changed()
        if report.gave_back:
            threads = [thread for thread, _ in report.gave_back]
            residencies = [residency for _, residency in report.gave_back]
            self._gave_back(threads, residencies)
        for failure in report.failed:
            self._failed(failure)

    def _gave_back(self, threads: list[bytes], residencies: list[int]) -> None:
        for residency in residencies:
            self._forget(residency)
        self._port.send(GaveBack(threads, residencies, self._blocks_free))

    def _failed(self, failure: Failure) -> None:
        error = failure.error
        if error.kind is ErrorKind.STALE:
            return  # the residency is here already
        if error.kind is ErrorKind.EXHAUSTED:
            self._gave_back([failure.thread], [failure.residency])
            return
        self._forget(failure.residency)
        self._port.send(Refused(failure.thread, failure.residency, error.kind, error.detail))

    def _metrics(self) -> Metrics:
        blocks = 0 if self._engine is None else self._engine.blocks
        return self._measures.report(
            *self._name, residents=len(self._held), blocks=blocks, blocks_free=self._blocks_free
        )

    def _broke(self, error: BaseException) -> None:
        """The step thread is dead, and the process with it."""
        raise error


async def in_a_thread(call: Callable[[], T]) -> T:
    """What the call gives, from a thread that ends with it.

    Not a pool's: OpenMP keeps a team of workers for every thread that has computed, and where they
    are more than the cores, GCC's library lets none of them wait actively: steps of the step
    thread would take a sixth longer for as long as the loading thread lives.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(value: T | None, error: BaseException | None) -> None:
        if future.cancelled():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(value)  # type: ignore[arg-type]  # a value where there is no error

    def run() -> None:
        try:
            value = call()
        except BaseException as error:
            loop.call_soon_threadsafe(settle, None, error)
        else:
            loop.call_soon_threadsafe(settle, value, None)

    threading.Thread(target=run, name="loading", daemon=True).start()
    return await future


def messages_of(computed: list[Computed]) -> Iterator[tuple[Vectors, bytes]]:
    """Complete calls as messages with their blobs, none of them too large."""
    while computed:
        used, size = 0, 0
        for each in computed:
            if used and size + len(each.vectors) > VECTORS_BYTES:
                break
            used, size = used + 1, size + len(each.vectors)
        some, computed = computed[:used], computed[used:]
        sizes = [len(each.vectors) for each in some]
        offsets = list(accumulate(sizes, initial=0))[:-1]
        vectors = Vectors(
            [each.thread for each in some],
            [each.residency for each in some],
            offsets,
            sizes,
            some[0].width,
        )
        yield vectors, b"".join(each.vectors for each in some)


def stepped(rows: list[Proposal], blocks_free: int) -> Stepped:
    """Proposals as columns; scores only where there are any."""
    scores = [row.score for row in rows]
    prompt_scores = [row.prompt_scores for row in rows]
    return Stepped(
        [row.thread for row in rows],
        [row.residency for row in rows],
        [row.position for row in rows],
        [row.token for row in rows],
        [row.end for row in rows],
        blocks_free,
        scores if any(score is not None for score in scores) else None,
        prompt_scores if any(score is not None for score in prompt_scores) else None,
    )
