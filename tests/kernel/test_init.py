"""Init with real processes, a kernel played by the test, and services that do as they are told."""

import fcntl
import json
import os
import random
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
from libllm.config import Home
from llmkernel.init import descend, guard
from llmkernel.initlink import Link
from llmproto.base import Message
from llmproto.init import (
    Child,
    Exited,
    Fork,
    Forked,
    Halt,
    InitMessage,
    Promoted,
    Signal,
    Spec,
    Stop,
)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc and uses pidfds")

PATIENCE_S = 60.0
"""Only bounds a test that fails."""
STUBS = str(Path(__file__).with_name("stubs"))


def arrives(readable: int | Link | socket.socket) -> None:
    """Wait until there is something to read."""
    ready, _, _ = select.select([readable], [], [], PATIENCE_S)
    assert ready, "nothing arrived"


class Death:
    """Watches a process, whoever its parent is."""

    def __init__(self, pid: int) -> None:
        self._pidfd = os.pidfd_open(pid)

    def wait(self) -> None:
        """Return when it has ended."""
        arrives(self._pidfd)
        os.close(self._pidfd)


class Listener:
    """Accepts what stubs connect to."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.bind(str(path))
        self._socket.listen(64)

    def next(self) -> tuple[socket.socket, dict[str, Any]]:  # Any: JSON
        """The next connection and what it said of itself."""
        arrives(self._socket)
        connection, _ = self._socket.accept()
        arrives(connection)
        return connection, json.loads(connection.recv(1 << 16))

    def close(self) -> None:
        self._socket.close()


M = TypeVar("M", bound=Message)


class Kernel:
    """The test's side of a stub kernel."""

    def __init__(self, listener: Listener) -> None:
        self.connection, told = listener.next()
        self.pid: int = told["pid"]
        self.was_standby: bool = told["standby"]
        self.link = Link(self.connection)
        self._received: list[InitMessage] = []

    def take(self, kind: type[M]) -> M:
        """The next message of this kind; others stay for later."""
        while True:
            for message in self._received:
                if isinstance(message, kind):
                    self._received.remove(message)
                    return message
            arrives(self.link)
            self._received += self.link.receive()
            assert not self.link.closed, "the kernel is gone"

    def mute(self) -> None:
        """No more beats."""
        self.connection.send(b"mute")


class Service:
    """The test's side of a stub service."""

    def __init__(self, listener: Listener) -> None:
        self.connection, self.told = listener.next()
        self.pid: int = self.told["pid"]

    def ask(self, word: bytes) -> bytes:
        """Say it and return what is answered."""
        self.connection.send(word)
        arrives(self.connection)
        return self.connection.recv(64)


class System:
    """A running init."""

    def __init__(self, root: Path, *, standby: bool = False) -> None:
        self.home = Home(root)
        self.home.make()
        self.kernels = Listener(self.home.run / "control")
        self.services = Listener(self.home.run / "report")
        self._connections: list[socket.socket] = []
        self.init = start_init(root, standby=standby)
        self.kernel = self.next_kernel()
        self.promoted = self.kernel.take(Promoted)

    def next_kernel(self) -> Kernel:
        """The kernel that rules next."""
        self.kernel = Kernel(self.kernels)
        self._connections.append(self.kernel.connection)
        return self.kernel

    def fork(self, spec: Spec, incarnation: int = 1) -> tuple[Child, Service]:
        """Have a service started."""
        self.kernel.link.send(Fork(spec=spec, incarnation=incarnation))
        child = self.kernel.take(Forked).child
        service = Service(self.services)
        self._connections.append(service.connection)
        assert service.pid == child.pid
        return child, service

    def killed(self) -> None:
        """SIGKILL init."""
        self.init.kill()
        self.init.wait()

    def log(self, name: str) -> str:
        return (self.home.logs / f"{name}.log").read_text()

    def close(self) -> None:
        self.init.kill()
        self.init.wait()
        for connection in self._connections:
            connection.close()
        self.kernels.close()
        self.services.close()


def start_init(root: Path, *, standby: bool = False) -> subprocess.Popen[str]:
    """An init with the stub kernel."""
    path = os.pathsep.join([STUBS, *(entry for entry in sys.path if entry)])
    return subprocess.Popen(
        [sys.executable, "-m", "stub_init", str(standby), "--home", str(root)],
        env=os.environ | {"PYTHONPATH": path},
        stderr=subprocess.PIPE,
        text=True,
    )


Boot = Callable[..., System]


@pytest.fixture
def boot(tmp_path: Path) -> Iterator[Boot]:
    """Boots systems, and ends them after the test."""
    systems: list[System] = []

    def boot_one(**options: bool) -> System:
        systems.append(System(tmp_path / f"h{len(systems)}", **options))
        return systems[-1]

    yield boot_one
    for system in systems:
        if system.init.stderr:
            system.init.stderr.close()
        system.close()


def spec(name: str = "tokenizer", *arguments: str, fork: bool = False, **more: Any) -> Spec:
    """A stub service.  Any: the fields of Spec are of several types."""
    return Spec(
        name=name,
        role=name,
        module="stub_service",
        arguments=list(arguments),
        fork=fork,
        **more,
    )


@pytest.mark.parametrize("image", [False, True])
def test_starts_a_service_with_what_it_needs(boot: Boot, image: bool) -> None:
    system = boot()
    core = min(os.sched_getaffinity(0))
    child, service = system.fork(spec("executor-1", "a", "b", fork=image, cores=[core], nice=3), 3)
    told = service.told
    assert told["name"] == "executor-1"
    assert told["incarnation"] == 3
    assert told["arguments"] == ["a", "b"]
    assert told["parent"] == system.init.pid
    assert told["session"] == child.pid
    assert told["cores"] == [core]
    assert told["nice"] == os.nice(0) + 3
    assert told["proof"] == child.proof.hex()
    assert len(child.proof) == 32
    assert told["init_fd"] is None
    assert told["imported"] is image
    # Standard streams, proof, lifeline, its own socket, and the folder it lists.
    assert len(told["descriptors"]) == 7
    service.connection.send(b"raise")
    exit_ = system.kernel.take(Exited).exit
    assert (exit_.name, exit_.incarnation, exit_.code) == ("executor-1", 3, 1)
    assert "says hello" in system.log("executor-1")
    assert "RuntimeError: as told" in system.log("executor-1")


def test_a_repeated_fork_is_the_same_process(boot: Boot) -> None:
    system = boot()
    child, _ = system.fork(spec())
    system.kernel.link.send(Fork(spec=spec(), incarnation=1))
    assert system.kernel.take(Forked).child == child


def test_a_fork_that_fails_is_an_exit_with_127(boot: Boot) -> None:
    system = boot()
    system.kernel.link.send(Fork(spec=spec("../outside"), incarnation=5))
    exit_ = system.kernel.take(Exited).exit
    assert (exit_.name, exit_.incarnation, exit_.code) == ("../outside", 5, 127)


@pytest.mark.parametrize("image", [False, True])
def test_an_exit_is_reported_with_code_or_signal(boot: Boot, image: bool) -> None:
    system = boot()
    _, service = system.fork(spec(fork=image))
    service.connection.send(b"exit")
    exit_ = system.kernel.take(Exited).exit
    assert (exit_.code, exit_.signal, exit_.out_of_memory) == (7, None, False)
    child, _ = system.fork(spec(fork=image), 2)
    os.kill(child.pid, signal.SIGKILL)
    exit_ = system.kernel.take(Exited).exit
    assert (exit_.code, exit_.signal, exit_.pid) == (None, signal.SIGKILL, child.pid)


def test_signals_only_the_incarnation_that_is_meant(boot: Boot) -> None:
    system = boot()
    child, service = system.fork(spec(), 2)
    system.kernel.link.send(Signal(pid=child.pid, incarnation=1, signal=signal.SIGKILL))
    system.kernel.link.send(Signal(pid=os.getpid(), incarnation=2, signal=signal.SIGKILL))
    assert service.ask(b"deaf") == b"done"
    system.kernel.link.send(Signal(pid=child.pid, incarnation=2, signal=signal.SIGTERM))
    system.kernel.link.send(Signal(pid=child.pid, incarnation=2, signal=signal.SIGKILL))
    assert system.kernel.take(Exited).exit.signal == signal.SIGKILL


@pytest.mark.parametrize("how", [b"spawn", b"daemon"])
def test_descendants_are_gone_before_the_exit_is_reported(boot: Boot, how: bytes) -> None:
    system = boot()
    child, service = system.fork(spec())
    _, other = system.fork(spec("monitor"))
    grandchild, spared = int(service.ask(how)), int(other.ask(how))
    os.kill(child.pid, signal.SIGKILL)
    system.kernel.take(Exited)
    assert not Path(f"/proc/{grandchild}").exists()
    assert Path(f"/proc/{spared}").exists()


def test_a_new_kernel_is_told_what_lives_and_what_died(boot: Boot) -> None:
    system = boot()
    child, _ = system.fork(spec("lives"))
    gone, _ = system.fork(spec("dies"))
    system.kernel.mute()
    os.kill(system.kernel.pid, signal.SIGSTOP)
    os.kill(gone.pid, signal.SIGKILL)
    wait_for_line(system.home.logs / "init.log", count=2, word='"name":"dies"')
    os.kill(system.kernel.pid, signal.SIGKILL)
    promoted = system.next_kernel().take(Promoted)
    assert promoted.children == [child]
    assert [(row.name, row.signal) for row in promoted.exits] == [("dies", signal.SIGKILL)]
    assert promoted.boot_id == system.promoted.boot_id
    assert (system.promoted.kernel_incarnation, promoted.kernel_incarnation) == (1, 2)


def test_a_silent_kernel_is_killed(boot: Boot) -> None:
    system = boot()
    death = Death(system.kernel.pid)
    os.kill(system.kernel.pid, signal.SIGSTOP)
    death.wait()
    assert system.next_kernel().take(Promoted).kernel_incarnation == 2
    assert "kernel is silent" in system.log("init")


def test_a_standby_is_promoted(boot: Boot) -> None:
    system = boot(standby=True)
    # Its interpreter runs once it has written its name into the log of init.
    wait_for_line(system.home.logs / "init.log", count=2, word='"name":"kernel"')
    os.kill(system.kernel.pid, signal.SIGKILL)
    kernel = system.next_kernel()
    assert kernel.was_standby
    assert kernel.take(Promoted).kernel_incarnation == 2


def wait_for_line(path: Path, *, count: int, word: str) -> None:
    """Return when so many lines of a log hold the word."""
    with path.open() as file:
        poll = select.poll()
        while sum(word in line for line in file) < count:
            file.seek(0)
            poll.poll(10)


def test_a_kernel_that_dies_again_and_again_is_started_again(boot: Boot) -> None:
    system = boot()
    child, _ = system.fork(spec())
    for number in range(2, 6):
        os.kill(system.kernel.pid, signal.SIGKILL)
        promoted = system.next_kernel().take(Promoted)
        assert promoted.kernel_incarnation == number
        assert promoted.children == [child]


def test_nonsense_from_the_kernel_ends_it(boot: Boot) -> None:
    system = boot()
    death = Death(system.kernel.pid)
    system.kernel.connection.send(b"\x07\x01nonsense")
    death.wait()
    assert system.next_kernel().take(Promoted).kernel_incarnation == 2


@pytest.mark.parametrize("by_kernel", [False, True])
def test_ends_in_order(boot: Boot, by_kernel: bool) -> None:
    system = boot(standby=True)
    _, service = system.fork(spec())
    deaf_child, deaf = system.fork(spec("deaf", fork=True))
    assert deaf.ask(b"deaf") == b"done"
    pids = [service.pid, deaf_child.pid, system.kernel.pid, int(service.ask(b"daemon"))]
    deaths = [Death(pid) for pid in pids]
    if not by_kernel:
        system.init.send_signal(signal.SIGTERM)
        system.kernel.take(Stop)
    system.kernel.link.send(Halt())
    assert system.init.wait() == 0
    for death in deaths:
        death.wait()
    assert not (system.home.run / "pid").exists()
    again = start_init(system.home.root)
    assert system.next_kernel().take(Promoted).children == []
    again.terminate()
    system.kernel.link.send(Halt())
    assert again.wait() == 0
    assert again.stderr is not None
    again.stderr.close()


def test_a_stopped_kernel_does_not_keep_init_from_ending(boot: Boot) -> None:
    system = boot()
    os.kill(system.kernel.pid, signal.SIGSTOP)
    system.init.terminate()
    assert system.init.wait() == 0


def test_a_killed_init_leaves_nothing_behind(boot: Boot) -> None:
    system = boot(standby=True)
    _, plain = system.fork(spec("plain"))
    _, forked = system.fork(spec("forked", fork=True))
    assert plain.ask(b"deaf") == forked.ask(b"deaf") == b"done"
    pids = [plain.pid, forked.pid, system.kernel.pid]
    pids += [int(service.ask(how)) for service in (plain, forked) for how in (b"spawn", b"daemon")]
    deaths = [Death(pid) for pid in pids]
    system.killed()
    for death in deaths:
        death.wait()
    # The guard has let the lock go, or does so before the next init gives up.
    again = start_init(system.home.root)
    assert system.next_kernel().take(Promoted).children == []
    again.kill()
    again.communicate()


def test_a_second_init_is_refused(boot: Boot) -> None:
    system = boot()
    second = start_init(system.home.root)
    _, said = second.communicate()
    assert second.returncode == 3
    assert f"process {system.init.pid} already runs" in said
    assert len(said.splitlines()) == 1


def test_refuses_a_home_that_cannot_be(tmp_path: Path) -> None:
    in_the_way = tmp_path / "file"
    in_the_way.write_text("")
    for root in (in_the_way, Path("/proc/llmos"), tmp_path / ("x" * 100)):
        init = start_init(root)
        _, said = init.communicate()
        assert init.returncode == 2
        assert len(said.splitlines()) == 1
        assert str(root) in said


def test_the_home_is_closed_to_others(boot: Boot) -> None:
    system = boot()
    for path in (system.home.root, system.home.run, system.home.keys, system.home.journal):
        assert path.stat().st_mode & 0o077 == 0
    for path in (system.home.operator_key, system.home.service_key):
        assert path.stat().st_mode & 0o777 == 0o600
        assert len(path.read_bytes()) == 32
    keys = system.home.operator_key.read_bytes()
    assert keys != system.home.service_key.read_bytes()
    system.killed()
    again = start_init(system.home.root)
    system.next_kernel().take(Promoted)
    assert system.home.operator_key.read_bytes() == keys
    again.kill()
    again.communicate()


@pytest.mark.long
def test_init_killed_at_any_moment_leaves_nothing_behind(tmp_path: Path) -> None:
    source = random.Random(3)
    for number in range(60):
        home = Home(tmp_path / f"h{number}")
        home.make()
        kernels, services = Listener(home.run / "control"), Listener(home.run / "report")
        init = start_init(home.root)
        kernel = Kernel(kernels)
        for row in range(6):
            kernel.link.send(Fork(spec=spec(f"s{row}", fork=row % 2 == 1), incarnation=1))
        asked = Service(services)
        asked.ask(b"daemon")
        for _ in range(source.randrange(4000)):
            kernel.link.flush()
        # Whatever was begun by now, or begins while the signal is on its way.
        init.kill()
        init.communicate()
        lock = os.open(home.lock, os.O_RDWR)
        fcntl.flock(lock, fcntl.LOCK_EX)
        os.close(lock)
        marked = [row.pid for row in descend.everything() if guard.carries_mark(row.pid, home.root)]
        assert [pid for pid in marked if not is_dying(pid)] == []
        asked.connection.close()
        kernel.link.close()
        kernels.close()
        services.close()


def is_dying(pid: int) -> bool:
    """Killed, and only not reaped yet."""
    row = descend.row(pid)
    return row is None or row.zombie
