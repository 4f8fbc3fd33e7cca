"""What `llmos demo` shows: a stream that outlives its executor and its kernel.

Boots a system of its own in a temporary home, kills parts of it in mid-stream with SIGKILL, and
compares the text with that of an undisturbed run. Leaves nothing behind, however it ends.
"""

import contextlib
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

import msgspec
from llmproto.errors import ErrorKind, RemoteError
from llmproto.operation import ProcessRow
from rich.console import Console

from libllm.cli import tables
from libllm.cli.system import Operator, System
from libllm.config import Home
from libllm.options import Options
from libllm.results import Piece

CONFIG: Final = """\
[executor]
mode = "exact"

[gateway]
port = 0
"""
PROMPT: Final = "The for statement"
TOKENS: Final = 300
OPTIONS: Final[Options] = {
    "max_tokens": TOKENS,
    "temperature": 0.7,
    "top_p": 0.95,
    "seed": 7,
    "ignore_eos": True,
    "deadline_s": 60.0,
}
VICTIMS: Final = (("executor", 70), ("kernel", 160))
"""Roles, and the number of tokens after which one of it is killed."""
ON_THE_WAY: Final = 60
"""Tokens after which a kill counts as survived even where no wait was noticed."""
WAIT_S: Final = 0.03
"""A wait for a token that is longer than a step takes."""
BOOT_S: Final = 60.0


class Kill(msgspec.Struct):
    """One murder in the demonstration."""

    process: str
    pid: int
    after_tokens: int
    pause_ms: float | None = None
    """From the signal to the next token that was not on its way yet."""


class Report(msgspec.Struct):
    """What came of it."""

    text: str
    kills: list[Kill]
    seconds: float
    equal: bool = True
    """Another outcome is an error."""


class Stage:
    """Where the demonstration is shown: a terminal, or nowhere with --json."""

    def __init__(self, out: Console | None) -> None:
        self._out = out
        self._fresh = True

    def text(self, text: str) -> None:
        """Part of the stream."""
        if self._out is not None and text:
            self._out.print(text, end="", markup=False, highlight=False, soft_wrap=True)
            self._out.file.flush()
            self._fresh = text.endswith("\n")

    def line(self, text: str, style: str | None = None) -> None:
        """A remark on a line of its own."""
        if self._out is not None:
            if not self._fresh:
                self._out.print()
            self._out.print(text, style=style, markup=False, highlight=False, soft_wrap=True)
            self._fresh = True

    def processes(self, rows: Sequence[ProcessRow]) -> None:
        """`ps`, between empty lines."""
        if self._out is not None:
            self.line("\n$ llmos ps", "bold")
            self._out.print(tables.processes(rows))
            self._out.print()


def demonstrate(system: System, stage: Stage) -> Report:
    """The whole of it.  RemoteError where a stream fails or the texts differ."""
    began_s = time.monotonic()
    with temporary_home(system) as home:
        stage.line(f"booting in {home.root}, mode exact ...")
        system.boot(home, timeout_s=BOOT_S)
        with system.connect(home) as operator:
            stage.line(f"ready after {time.monotonic() - began_s:.1f} s", "bold")
            disturbed, kills = perform(operator, stage)
            stage.line("\nthe same again, undisturbed ...", "bold")
            undisturbed = "".join(piece.text for piece in _pieces(operator))
            stage.processes(operator.ps())
    seconds = time.monotonic() - began_s
    require_equal(disturbed, undisturbed)
    stage.line(
        f"{TOKENS} tokens, {len(kills)} processes killed in mid-stream: both texts are equal, "
        f"{len(disturbed)} characters. {seconds:.1f} s in all.",
        "bold green",
    )
    return Report(disturbed, kills, seconds)


def require_equal(disturbed: str, undisturbed: str) -> None:
    """RemoteError(INTERNAL) that shows the first difference."""
    if disturbed == undisturbed:
        return
    pairs = enumerate(zip(disturbed, undisturbed))
    shorter = min(len(disturbed), len(undisturbed))
    at = next((index for index, (one, other) in pairs if one != other), shorter)
    raise RemoteError(
        ErrorKind.INTERNAL,
        f"the disturbed text differs from the undisturbed one from character {at} of "
        f"{len(undisturbed)}: {disturbed[at : at + 30]!r} against {undisturbed[at : at + 30]!r}",
    )


def perform(
    operator: Operator, stage: Stage, clock_s: Callable[[], float] = time.monotonic
) -> tuple[str, list[Kill]]:
    """Stream, and kill on the way; the text and what was done to it."""
    kills: list[Kill] = []
    victims = list(VICTIMS)
    texts: list[str] = []
    killed_s = 0.0
    for waited_s, piece in _timed(_pieces(operator), clock_s):
        if not texts:
            stage.processes(operator.ps())
            stage.text(PROMPT)
        kill = kills[-1] if kills else None
        if kill is not None and kill.pause_ms is None:
            # What was on its way at the time of the kill comes first, without a wait.
            is_over = piece.tokens >= kill.after_tokens + ON_THE_WAY
            if waited_s >= WAIT_S or is_over:
                kill.pause_ms = (clock_s() - killed_s) * 1000
                stage.line(f"=== goes on after {kill.pause_ms:.0f} ms", "bold green")
        texts.append(piece.text)
        stage.text(piece.text)
        if victims and piece.tokens >= victims[0][1]:
            role, _ = victims.pop(0)
            kills.append(strike(operator, stage, role, piece.tokens))
            killed_s = clock_s()
    stage.line("")
    if victims or any(kill.pause_ms is None for kill in kills):
        raise RemoteError(
            ErrorKind.INTERNAL, f"the stream ended before its {len(VICTIMS)} kills were survived"
        )
    return "".join(texts), kills


def _timed(pieces: Iterator[Piece], clock_s: Callable[[], float]) -> Iterator[tuple[float, Piece]]:
    """Each piece with the time that was spent waiting for it."""
    while True:
        asked_s = clock_s()
        piece = next(pieces, None)
        if piece is None:
            return
        yield clock_s() - asked_s, piece


def strike(operator: Operator, stage: Stage, role: str, tokens: int) -> Kill:
    """SIGKILL one process of this role, from outside, as an accident would."""
    row = next((row for row in operator.ps() if row.role == role and row.pid is not None), None)
    if row is None or row.pid is None:
        raise RemoteError(ErrorKind.INTERNAL, f"ps shows no living {role}")
    os.kill(row.pid, signal.SIGKILL)
    stage.line(f"=== SIGKILL {row.name} (pid {row.pid}) after {tokens} tokens", "bold red")
    return Kill(row.name, row.pid, tokens)


def _pieces(operator: Operator) -> Iterator[Piece]:
    pieces = operator.generate(PROMPT, stream=True, **OPTIONS)
    try:
        yield from pieces
    finally:
        pieces.close()


@contextlib.contextmanager
def temporary_home(system: System) -> Iterator[Home]:
    """A configured home that is stopped and removed in the end, after Ctrl-C too."""
    root = Path(tempfile.mkdtemp(prefix="llmos-demo-"))
    try:
        home = system.home(str(root))
        home.config.write_text(CONFIG)
        try:
            yield home
        finally:
            system.stop(home)
    finally:
        shutil.rmtree(root, ignore_errors=True)
