"""Named points that a process passes; an armed one strikes when it is passed for the n-th time.

A test arms a point by a file in the home, at any time; the process that passes it looks for the
file, strikes once, and leaves a note that it did.
"""

import os
import signal
from collections.abc import Sequence
from pathlib import Path

import msgspec

SELF = 0
"""Stands for the process that passes the point."""


class Trap(msgspec.Struct, frozen=True):
    """What happens at a point."""

    pids: list[int]
    """Struck in this order."""
    nth: int = 1
    signal: int = signal.SIGKILL


class Point:
    """An armed point, as a test sees it."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @property
    def struck(self) -> bool:
        """It was passed often enough."""
        return self._path.with_suffix(".struck").exists()

    def disarm(self) -> None:
        """Whether it struck or not, nothing more happens here."""
        self._path.unlink(missing_ok=True)
        self._path.with_suffix(".struck").unlink(missing_ok=True)


def arm(
    home: Path,
    point: str,
    *,
    pids: Sequence[int] = (SELF,),
    nth: int = 1,
    number: int = signal.SIGKILL,
) -> Point:
    """From now on the n-th passing of this point strikes these processes."""
    armed = Point(_path(home, point))
    armed.disarm()
    path = _path(home, point)
    path.parent.mkdir(exist_ok=True)
    unfinished = path.with_suffix(".new")
    unfinished.write_bytes(msgspec.json.encode(Trap(list(pids), nth, number)))
    unfinished.rename(path)
    return armed


class Points:
    """The points of one process."""

    def __init__(self) -> None:
        self._home = Path(os.environ["LLMOS_HOME"])
        self._passed: dict[tuple[str, int], int] = {}

    def passing(self, point: str) -> None:
        """The process is here; it may not go on from here."""
        path = _path(self._home, point)
        try:
            armed = path.stat().st_mtime_ns
            trap = msgspec.json.decode(path.read_bytes(), type=Trap)
        except FileNotFoundError:
            return
        passed = self._passed[point, armed] = self._passed.get((point, armed), 0) + 1
        if passed < trap.nth:
            return
        path.rename(path.with_suffix(".struck"))
        for pid in trap.pids:
            try:
                os.kill(pid or os.getpid(), trap.signal)
            except ProcessLookupError:
                continue


def _path(home: Path, point: str) -> Path:
    return home / "faults" / f"{point}.armed"
