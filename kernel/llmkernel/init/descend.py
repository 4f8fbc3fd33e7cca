"""Who descends from whom, as /proc tells it.  Elsewhere than on Linux it tells nothing."""

import os
from collections.abc import Iterator
from pathlib import Path

import msgspec

PROC = Path("/proc")


class Row(msgspec.Struct, frozen=True):
    """A process."""

    pid: int
    parent: int
    session: int
    zombie: bool


def row(pid: int) -> Row | None:
    """One process, or None when it is gone."""
    try:
        text = (PROC / str(pid) / "stat").read_bytes()
    except OSError:
        return None
    # The name stands in parentheses and may itself hold any of them.
    fields = text[text.rindex(b")") + 2 :].split()
    return Row(pid=pid, parent=int(fields[1]), session=int(fields[3]), zombie=fields[0] == b"Z")


def everything() -> Iterator[Row]:
    """All processes of the system."""
    if not PROC.is_dir():
        return
    for name in os.listdir(PROC):
        if name.isdigit() and (found := row(int(name))) is not None:
            yield found


def children_of_self() -> list[Row]:
    """Our own children, adopted ones too."""
    me = os.getpid()
    try:
        pids = (PROC / "self" / "task" / str(me) / "children").read_bytes().split()
    except OSError:  # a system without that file
        return [found for found in everything() if found.parent == me]
    rows = (row(int(pid)) for pid in pids)
    return [found for found in rows if found is not None]


def variables(pid: int) -> dict[bytes, bytes]:
    """The environment a program was started with; empty when it is gone or not ours."""
    try:
        text = (PROC / str(pid) / "environ").read_bytes()
    except OSError:
        return {}
    pairs = (entry.partition(b"=") for entry in text.split(b"\0") if entry)
    return {name: value for name, _, value in pairs}
