"""What `llmos demo train` shows: a model that is trained while it serves, and swapped under its
streams.

Boots a system of its own in a temporary home, lets the embedded model serve as `demo`, teaches it
sums while streams run, kills the trainer in the middle, and lets the result take over the name.
Then the same training undisturbed: the losses must be the same doubles; and every stream's text
must be the one that its version gives alone.  Leaves nothing behind, however it ends.
"""

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Final

import msgspec
from llmproto.errors import ErrorKind, RemoteError
from llmproto.jobs import JobState, StepReport
from llmproto.recipes import DataRecipe, FinishRecipe, Recipe, TrainingRecipe

from libllm.cli.performance import BOOT_S, Kill, Stage, temporary_home
from libllm.cli.system import Operator, Running, System
from libllm.config import Home
from libllm.options import Options

NAME: Final = "demo"
TWIN: Final = "demo-twin"
MODEL: Final = "llmos-mini"
PROMPT: Final = "6 plus 7 is"
OPTIONS: Final[Options] = {
    "max_tokens": 40,
    "temperature": 0.7,
    "seed": 7,
    "ignore_eos": True,
    "deadline_s": 60.0,
}
READERS: Final = 2
"""Streams at once."""
STEPS: Final = 40
KILL_AT: Final = 23
"""Not where a checkpoint is."""
SHOWN: Final = 10
"""Every so many steps a line."""
SUMMANDS: Final = 20


class Stream(msgspec.Struct, frozen=True):
    """One stream, from its first to its last piece."""

    model: str
    """The version that it ran on."""
    text: str
    began_s: float
    ended_s: float


class Report(msgspec.Struct):
    """What came of it."""

    losses: list[float]
    versions: list[str]
    """The one that served first, and the one that was made."""
    streams: int
    streams_across: int
    """That ran on the old version while the new one served already."""
    kill: Kill
    attempts: int
    seconds: float
    answers: list[str]
    """What each version makes of the prompt."""


class Readers:
    """Streams that run one after another in threads of their own, until they are told to end."""

    def __init__(self, operator: Operator) -> None:
        self._operator = operator
        self._ending = threading.Event()
        self._error: RemoteError | None = None
        self.streams: list[Stream] = []
        self._threads = [
            threading.Thread(target=self._read, name=f"reader-{number}", daemon=True)
            for number in range(READERS)
        ]

    def start(self) -> None:
        """Begin to read."""
        for thread in self._threads:
            thread.start()

    def end(self) -> list[Stream]:
        """Let the last ones end; RemoteError where one broke off."""
        self._ending.set()
        for thread in self._threads:
            thread.join()
        if self._error is not None:
            raise self._error
        return self.streams

    def _read(self) -> None:
        try:
            while not self._ending.is_set():
                self.streams.append(read(self._operator, NAME))
        except RemoteError as error:  # told to the main thread by `end`
            self._error = error


def read(operator: Operator, model: str) -> Stream:
    """One stream to its end."""
    began_s = time.monotonic()
    options: Options = {**OPTIONS, "model": model}
    pieces = operator.generate(PROMPT, stream=True, **options)
    try:
        text = "".join(piece.text for piece in pieces)
        return Stream(pieces.model, text, began_s, time.monotonic())
    finally:
        pieces.close()


def demonstrate(system: System, stage: Stage) -> Report:
    """The whole of it.  RemoteError where anything is not as it must be."""
    began_s = time.monotonic()
    with temporary_home(system) as home:
        stage.line(f"booting in {home.root}, mode exact ...")
        system.boot(home, timeout_s=BOOT_S)
        with system.connect(home) as operator:
            stage.line(f"ready after {time.monotonic() - began_s:.1f} s", "bold")
            report = perform(operator, stage, home)
    report.seconds = time.monotonic() - began_s
    stage.line(
        f"{STEPS} steps with the trainer killed in the middle: every loss is the same double as "
        f"without. {report.streams} streams meanwhile, {report.streams_across} of them across the "
        f"swap: every text is its version's own. {report.seconds:.1f} s in all.",
        "bold green",
    )
    return report


def perform(operator: Operator, stage: Stage, home: Home) -> Report:
    """In a system that runs."""
    data = write_sums(home.root / "sums.jsonl")
    folder = next(row.model.path for row in operator.models() if row.model.name == MODEL)
    first = operator.import_version(Path(folder), NAME, base=None).reference
    operator.deploy(first, name=None, replicas=1, device=None, gate="", wait=True)
    stage.line(f"{first} serves as {NAME!r}; {READERS} streams run from now on")
    readers = Readers(operator)
    readers.start()
    job = operator.train(recipe_of(NAME, first, data, deploy=True))
    stage.line(f"$ llmos train: job {job.id.hex()}, {STEPS} steps on sums", "bold")
    reports, kill = watch(operator, job, stage)
    result = job.result()
    made = result.reference
    swapped_s = time.monotonic()
    if made is None:
        raise RemoteError(ErrorKind.INTERNAL, "the training ended without a version")
    until_served(operator, made)
    stage.line(f"{made} serves as {NAME!r} now", "bold green")
    streams = readers.end()
    stage.line("\nthe same training again, undisturbed ...", "bold")
    twin = operator.train(recipe_of(TWIN, first, data, deploy=False))
    undisturbed = [report for look in twin.watch() for report in look.reports]
    twin.result()
    require_equal(reports, undisturbed)
    answers = require_own_texts(operator, streams, [first, made])
    for reference, answer in zip((first, made), answers):
        stage.line(f"  {reference}: {PROMPT}{answer.splitlines()[0]}")
    return Report(
        losses=[report.loss for report in reports],
        versions=[first, made],
        streams=len(streams),
        streams_across=sum(
            stream.model == first and stream.ended_s > swapped_s for stream in streams
        ),
        kill=kill,
        attempts=result.row.attempts,
        seconds=0.0,
        answers=answers,
    )


def write_sums(path: Path) -> str:
    """What is learned."""
    rows = [
        {"prompt": f"{one} plus {other} is", "completion": f" {one + other}."}
        for one in range(SUMMANDS)
        for other in range(SUMMANDS)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def recipe_of(name: str, base: str, data: str, *, deploy: bool) -> Recipe:
    """The training; the same but for the name and what follows."""
    return Recipe(
        name=name,
        base=base,
        data=DataRecipe(train=[data]),
        training=TrainingRecipe(
            steps=STEPS,
            batch=8,
            learning_rate=1e-3,
            schedule="cosine",
            warmup_steps=5,
            checkpoint_every=SHOWN,
        ),
        finish=FinishRecipe(deploy=deploy),
    )


def watch(operator: Operator, job: Running, stage: Stage) -> tuple[list[StepReport], Kill]:
    """Follow the job to its end, and kill its trainer on the way."""
    reports: list[StepReport] = []
    kill: Kill | None = None
    killed_s = 0.0
    for look in job.watch():
        for report in look.reports:
            reports.append(report)
            if report.step % SHOWN == 0 or report.step == 1:
                stage.line(f"  step {report.step:>3}  loss {report.loss:.6f}")
        if kill is not None and kill.pause_ms is None and look.row.attempts > 1 and look.reports:
            kill.pause_ms = (time.monotonic() - killed_s) * 1000
            stage.line(
                f"=== attempt {look.row.attempts} goes on from the checkpoint of step "
                f"{look.row.checkpoint_step} after {kill.pause_ms:.0f} ms",
                "bold green",
            )
        if kill is None and len(reports) >= KILL_AT and look.row.state is JobState.RUNNING:
            kill = strike(operator, stage, len(reports))
            killed_s = time.monotonic()
    if kill is None:
        raise RemoteError(ErrorKind.INTERNAL, "the training ended before it could be killed")
    return reports, kill


def strike(operator: Operator, stage: Stage, step: int) -> Kill:
    """SIGKILL the trainer, from outside, as an accident would."""
    row = next((row for row in operator.ps() if row.role == "trainer" and row.pid), None)
    if row is None or row.pid is None:
        raise RemoteError(ErrorKind.INTERNAL, "ps shows no living trainer")
    os.kill(row.pid, signal.SIGKILL)
    stage.line(f"=== SIGKILL {row.name} (pid {row.pid}) after step {step}", "bold red")
    return Kill(row.name, row.pid, step)


def until_served(operator: Operator, reference: str) -> None:
    """Until new streams run on this version: a few of them, each to its end."""
    for _ in range(1000):  # some seconds: the executor is loaded by then
        if any(row.serving == reference for row in operator.deployments()):
            return
        time.sleep(0.05)
    raise RemoteError(ErrorKind.DEADLINE, f"{reference} does not serve")


def require_equal(disturbed: list[StepReport], undisturbed: list[StepReport]) -> None:
    """RemoteError(INTERNAL) at the first step whose losses are not the same double."""
    if [report.step for report in disturbed] != list(range(1, STEPS + 1)):
        raise RemoteError(
            ErrorKind.INTERNAL, f"{len(disturbed)} steps were reported, in order, not {STEPS}"
        )
    for one, other in zip(disturbed, undisturbed, strict=True):
        if one.loss != other.loss:
            raise RemoteError(
                ErrorKind.INTERNAL,
                f"step {one.step}: loss {one.loss!r}, undisturbed {other.loss!r}",
            )


def require_own_texts(
    operator: Operator, streams: list[Stream], references: list[str]
) -> list[str]:
    """What each version says alone; RemoteError(INTERNAL) where a stream said otherwise."""
    alone = {reference: read(operator, reference).text for reference in references}
    for stream in streams:
        if stream.text != alone.get(stream.model):
            raise RemoteError(
                ErrorKind.INTERNAL,
                f"a stream on {stream.model} said {stream.text!r}, alone it says "
                f"{alone.get(stream.model)!r}",
            )
    return [alone[reference] for reference in references]
