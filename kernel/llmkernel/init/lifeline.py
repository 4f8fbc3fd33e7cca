"""What ties a child's life to init's: a pipe whose end only init holds, and the death signal.

Source: prctl(2): PR_SET_PDEATHSIG survives exec and is dropped by fork; PR_SET_CHILD_SUBREAPER
makes the orphans among our descendants our children.
"""

import ctypes
import os
import signal
import sys
from typing import Final

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_NAME: Final = 15
_PR_SET_CHILD_SUBREAPER: Final = 36
LINUX: Final = sys.platform == "linux"
_libc: Final = ctypes.CDLL(None, use_errno=True)


class Lifeline:
    """The pipe.  Invariant: after its child's setup no process but init holds the write end."""

    def __init__(self) -> None:
        self.read_end, self._write_end = os.pipe()


def become_subreaper() -> None:
    """Orphans among the descendants become children of this process (Linux)."""
    if LINUX:
        _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def die_with(parent: int) -> None:
    """In a child: be killed when the parent dies; exit at once if it is dead already."""
    if LINUX:
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def set_name(name: str) -> None:
    """What `ps` and `top` call this process (15 bytes, Linux)."""
    if LINUX:
        buffer = ctypes.create_string_buffer(name.encode()[:15])
        _libc.prctl(_PR_SET_NAME, buffer, 0, 0, 0)


def threads() -> int:
    """Threads of this process as the system counts them; 1 where it cannot be asked."""
    return len(os.listdir("/proc/self/task")) if LINUX else 1


def _prctl(option: int, value: int) -> None:
    if _libc.prctl(option, value, 0, 0, 0) != 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
