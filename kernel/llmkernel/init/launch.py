"""From fork to the first line of a child's program.

Two ways: a new interpreter (`python -m MODULE`), or this image without exec, for programs whose
imports init has made already.  Either way the child is a session of its own, holds no descriptor of
init's but those it is given, and dies with init.
"""

import gc
import os
import runpy
import signal
import sys
import traceback
from pathlib import Path
from typing import Final, NoReturn

import msgspec

from llmkernel.init import lifeline

FAILED: Final = 127
"""Exit code of a child whose program could not be started, as a shell has it."""


class Launch(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that a child needs to know."""

    name: str
    module: str
    arguments: list[str]
    log: Path
    """Takes standard output and standard error."""
    variables: dict[str, str | None]
    """Set in its environment; None: removed from it."""
    descriptors: list[int]
    """Kept open; all others of init's are closed."""
    cores: list[int] = []
    nice: int = 0
    """Added to init's own."""
    image: bool = False
    """Without exec."""


def start(launch: Launch) -> int:
    """The pid of the new process.  OSError where the system has no room for one."""
    assert lifeline.threads() == 1 or not launch.image, "only one thread survives a fork"
    parent = os.getpid()
    # A signal that arrived before the child has its own handlers would be taken for init's.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        pid = os.fork()
        if pid == 0:
            _be_child(launch, parent, before)
        return pid
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _be_child(launch: Launch, parent: int, mask: set[signal.Signals | int]) -> NoReturn:
    code = FAILED
    try:
        _settle(launch, parent)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if launch.image:
            code = _run(launch)
        else:
            command = [sys.executable, "-P", "-m", launch.module, *launch.arguments]
            os.execv(sys.executable, command)
    except BaseException:  # the outermost frame of the new process
        traceback.print_exc()
    finally:
        _flush()
        os._exit(code)  # init's own frames lie below: nothing may unwind into them


def _settle(launch: Launch, parent: int) -> None:
    lifeline.die_with(parent)
    gc.freeze()  # no object of init's may ever close a descriptor that is the child's by then
    os.setsid()
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGTERM, signal.SIGCHLD, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    _connect(launch.log)
    for name, value in launch.variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    lifeline.set_name(launch.name)
    if launch.cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, launch.cores)
    if launch.nice:
        os.nice(launch.nice)
    _close_all_but(launch.descriptors)
    for descriptor in launch.descriptors:
        os.set_inheritable(descriptor, not launch.image)


def _connect(log: Path) -> None:
    """Standard input from nothing, output and error to the log."""
    nothing = os.open(os.devnull, os.O_RDWR)
    try:
        output = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    except OSError:  # without a log it still serves
        output = nothing
    os.dup2(nothing, 0)
    os.dup2(output, 1)
    os.dup2(output, 2)


def _close_all_but(kept: list[int]) -> None:
    first = 3
    for descriptor in sorted(kept):
        os.closerange(first, descriptor)
        first = descriptor + 1
    os.closerange(first, os.sysconf("SC_OPEN_MAX"))


def _run(launch: Launch) -> int:
    """The program in this image, as `python -m` would run it; its exit code."""
    sys.argv = [launch.module, *launch.arguments]
    try:
        runpy.run_module(launch.module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return (end.code or 0) & 0xFF
        print(end.code, file=sys.stderr)
        return 1
    except BaseException:  # what the interpreter does at the end of a program
        traceback.print_exc()
        return 1
    return 0


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):  # its disk is full, or the program closed it
            continue
