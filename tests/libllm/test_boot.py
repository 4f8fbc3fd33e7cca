"""Booting, with small programs in init's place."""

import asyncio
import fcntl
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import pytest
from libllm.boot import EXIT_HELD, boot_async, init_command, is_running, wait_ended
from libllm.config import Home
from llmproto.errors import ErrorKind, RemoteError
from llmproto.operation import Status, StatusAsk

if TYPE_CHECKING:
    from tests.libllm.conftest import FakeKernel

HOLDER = """
import fcntl, os, sys
lock = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
fcntl.flock(lock, fcntl.LOCK_EX)
nothing = os.open(os.devnull, os.O_WRONLY)
os.dup2(nothing, 2)
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def holder(home: Home) -> "subprocess.Popen[bytes]":
    """A process that holds the home's lock until its input ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(home.lock)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None and process.stdout.readline() == b"held\n"
    return process


@pytest.fixture
async def answering(kernel: "FakeKernel") -> AsyncIterator[None]:
    """The kernel answers how it is: first starting, then ready."""

    async def answer() -> None:
        ready = False
        while True:
            header, _ = await kernel.hear(StatusAsk)
            kernel.say(Status(ready, "1", 1, 1, not_ready=["tokenizer: loading"]), answers=header)
            ready = True

    task = asyncio.create_task(answer())
    yield
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_where_a_system_runs_booting_waits_for_it(
    home: Home, holder: "subprocess.Popen[bytes]", answering: None
) -> None:
    assert is_running(home)
    status = await boot_async(home)
    assert status.ready
    assert not await wait_ended(home, timeout_s=0)
    holder.communicate(timeout=30)
    assert await wait_ended(home, timeout_s=30)


async def test_a_system_that_is_not_ready_in_time_is_named(
    home: Home, holder: "subprocess.Popen[bytes]"
) -> None:
    with pytest.raises(RemoteError, match="does not answer yet") as refused:
        await boot_async(home, timeout_s=0.2)
    assert refused.value.kind is ErrorKind.DEADLINE
    holder.communicate(timeout=30)


async def test_a_kernel_that_cannot_start_says_why(
    home: Home, holder: "subprocess.Popen[bytes]"
) -> None:
    log = home.logs / "kernel.log"
    log.write_text('{"event": "replayed"}\n{"event": "cannot start", "detail": "port in use"}\n')
    with pytest.raises(RemoteError, match="kernel cannot start: port in use") as refused:
        await boot_async(home, timeout_s=0.2)
    assert refused.value.kind is ErrorKind.DEADLINE
    log.write_text("no JSON\n")
    with pytest.raises(RemoteError, match="does not answer yet"):
        await boot_async(home, timeout_s=0.2)
    holder.communicate(timeout=30)


async def test_a_configuration_that_no_kernel_takes_is_refused_before_it_is_tried(
    home: Home,
) -> None:
    home.config.write_text('[kernel]\nlisten = "tcp://*:8751"\n')
    with pytest.raises(RemoteError, match="every network") as refused:
        await boot_async(home, command=[sys.executable, "-c", "raise AssertionError"])
    assert refused.value.kind is ErrorKind.INVALID


async def test_an_init_that_cannot_use_the_home_speaks_for_itself(home: Home) -> None:
    words = "import sys; print('llmos: the home is on fire', file=sys.stderr); sys.exit(2)"
    with pytest.raises(RemoteError) as refused:
        await boot_async(home, command=[sys.executable, "-c", words])
    assert (refused.value.kind, refused.value.detail) == (ErrorKind.INVALID, "the home is on fire")


async def test_an_init_that_breaks_is_quoted(home: Home) -> None:
    with pytest.raises(RemoteError, match=r"(?s)exit code 1.*ValueError: oh"):
        await boot_async(home, command=[sys.executable, "-c", "raise ValueError('oh')"])


async def test_an_init_that_finds_the_home_taken_is_no_error(home: Home, answering: None) -> None:
    """Two boot at once: the slower init says that the lock is held, by then it is."""
    program = (
        "import fcntl, os, subprocess, sys\n"
        f"holder = subprocess.Popen([sys.executable, '-c', {HOLDER!r}, {str(home.lock)!r}],\n"
        "    stdin=open(os.environ['HELD_BY'], 'rb'), stdout=subprocess.PIPE)\n"
        "holder.stdout.readline()\n"
        "os._exit(3)\n"
    )
    fifo = home.root / "until"
    os.mkfifo(fifo)
    writing = os.open(fifo, os.O_RDWR)
    os.environ["HELD_BY"] = str(fifo)
    try:
        status = await boot_async(home, command=[sys.executable, "-c", program])
        assert status.ready
    finally:
        del os.environ["HELD_BY"]
        os.close(writing)
        assert await wait_ended(home, timeout_s=30)


async def test_a_home_whose_lock_is_always_somebody_elses_is_given_up(home: Home) -> None:
    with pytest.raises(RemoteError, match="changes hands"):
        await boot_async(home, command=[sys.executable, "-c", f"import os; os._exit({EXIT_HELD})"])


def test_nothing_runs_without_a_lock_or_with_a_free_one(home: Home) -> None:
    assert not is_running(home)
    home.lock.touch()
    assert not is_running(home)
    with home.lock.open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert is_running(home)


def test_how_init_is_started(home: Home) -> None:
    command = init_command(home, foreground=True)
    assert command[0] == sys.executable
    assert command[-3:] == ["--home", str(home.root), "--foreground"]
