"""`python -m tests.system.faults.executor`: it passes points, and dies of marked threads.

A thread is marked by the first token of its prompt; the home's `faults/marks.json` says what a
mark does, and a test may write it at any time.
"""

import os
import signal
from pathlib import Path
from typing import Literal

import msgspec
from libllm.crashnotes import CrashNote
from libllm.port import Port
from libllm.service import Request
from llmproto import wire
from llmproto.execution import Run
from llmservices.executor.__main__ import main
from llmservices.executor.contract import PlanHook
from llmservices.executor.loader import Settings
from llmservices.executor.service import Executor

from tests.system.faults.serving import FaultyServing


class Mark(msgspec.Struct, frozen=True):
    """What a marked thread does to the process that computes it."""

    how: Literal["segv", "exit", "loop"]
    after: int = 0
    """At this output token."""
    beside: int | None = None
    """Only in one step with a thread of this mark."""


Marks = dict[int, Mark]


def write_marks(home: Path, marks: Marks) -> None:
    """These marks hold from the next thread on."""
    path = _path(home)
    path.parent.mkdir(exist_ok=True)
    unfinished = path.with_suffix(".new")
    unfinished.write_bytes(msgspec.json.encode(marks))
    unfinished.rename(path)


class Frail(Executor):
    """Dies of marked threads."""

    def __init__(
        self, port: Port, settings: Settings, note: Path, *, process: str, incarnation: int
    ) -> None:
        super().__init__(port, settings, note, process=process, incarnation=incarnation)
        self._home = Path(os.environ["LLMOS_HOME"])
        self._marked: dict[bytes, tuple[int, int]] = {}
        """Thread -> its mark, and where its prompt ends."""
        self._marks: Marks = {}

    def run(self, run: Run, request: Request) -> None:
        path = _path(self._home)
        if path.exists():
            self._marks = msgspec.json.decode(path.read_bytes(), type=Marks)
        first = wire.unpack_tokens(run.tokens)[0]
        if first in self._marks:
            self._marked[run.thread] = (first, run.prompt_tokens)
        super().run(run, request)

    def plan_hook(self, note: CrashNote) -> PlanHook:
        def planned(rows: list[tuple[bytes, int]]) -> None:
            note.write(rows)
            self._look(rows)

        return planned

    def _look(self, rows: list[tuple[bytes, int]]) -> None:
        """Called on the step thread, when the note is written."""
        present = {self._marked[thread][0] for thread, _ in rows if thread in self._marked}
        for thread, position in rows:
            if thread not in self._marked:
                continue
            name, prompt_tokens = self._marked[thread]
            mark = self._marks[name]
            if position < prompt_tokens + mark.after:
                continue
            if mark.beside is None or mark.beside in present:
                _die(mark.how)


def _die(how: str) -> None:
    match how:
        case "segv":
            os.kill(os.getpid(), signal.SIGSEGV)
        case "exit":
            os._exit(3)
    while True:  # computes, and comes to nothing
        pass


def _path(home: Path) -> Path:
    return home / "faults" / "marks.json"


if __name__ == "__main__":
    main(serving=FaultyServing, service=Frail)
