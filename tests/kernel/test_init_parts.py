"""The small parts of init: logs, OOM attribution, the lock, the image, what /proc tells."""

import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest
from libllm.config import Home
from llmkernel.init import descend, guard, lifeline, logs
from llmkernel.init.guard import Roll
from llmkernel.init.home import Claim, HeldElsewhere
from llmkernel.init.image import Image
from llmkernel.init.oom import OomCount
from llmproto import limits
from llmproto.errors import RemoteError

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def test_large_logs_move_aside_and_two_are_kept(tmp_path: Path) -> None:
    log = tmp_path / "tokenizer.log"
    with log.open("a") as writer:
        for number in range(4):
            writer.write(f"{number}" * 100)
            writer.flush()
            assert logs.rotate(tmp_path, 50) == ["tokenizer.log"]
        writer.write("small")
    assert logs.rotate(tmp_path, 50) == []
    assert log.read_text() == "small"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "tokenizer.log",
        "tokenizer.log.1",
        "tokenizer.log.2",
    ]
    assert (tmp_path / "tokenizer.log.1").read_text() == "3" * 100
    assert (tmp_path / "tokenizer.log.2").read_text() == "2" * 100


def oom_root(tmp_path: Path) -> Path:
    """A version 2 group with no kills so far."""
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/a\n")
    (tmp_path / "proc/self/mountinfo").write_text("29 23 0:26 / /c rw - cgroup2 cgroup2 rw\n")
    (tmp_path / "c/a").mkdir(parents=True)
    set_kills(tmp_path, 0)
    return tmp_path


def set_kills(root: Path, count: int) -> None:
    (root / "c/a/memory.events").write_text(f"max 9\noom 4\noom_kill {count}\n")


def test_each_counted_kill_explains_one_death(tmp_path: Path) -> None:
    root = oom_root(tmp_path)
    count = OomCount(root)
    assert not count.take()
    set_kills(root, 2)
    count.refresh()
    assert [count.take() for _ in range(3)] == [True, True, False]


def test_old_kills_explain_nothing(tmp_path: Path) -> None:
    root = oom_root(tmp_path)
    count = OomCount(root)
    set_kills(root, 1)
    count.refresh()
    count.refresh()
    assert not count.take()


def test_what_cannot_be_read_is_an_outside_kill(tmp_path: Path) -> None:
    count = OomCount(tmp_path)
    count.refresh()
    assert not count.take()


def test_a_home_is_claimed_once(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    claim = Claim(home)
    assert claim.pid_file.read_text() == f"{os.getpid()}\n"
    with pytest.raises(HeldElsewhere, match=f"process {os.getpid()} already runs"):
        Claim(home)
    claim.release()
    again = Claim(home)
    again.release()


def test_an_open_home_is_closed(tmp_path: Path) -> None:
    root = tmp_path / "home"
    root.mkdir(mode=0o755)
    Claim(Home(root)).release()
    assert root.stat().st_mode & 0o777 == 0o700


def test_a_folder_where_a_file_should_be(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    home.lock.mkdir(parents=True)
    with pytest.raises(RemoteError, match="cannot be used"):
        Claim(home)


def test_the_image_skips_what_is_not_installed() -> None:
    image = Image(["no_such_module_anywhere", "json"], logs.Log())
    image.load()
    gc.unfreeze()
    assert image.loaded
    assert image.usable is (lifeline.threads() == 1)
    assert "OPENBLAS_NUM_THREADS" not in os.environ


def test_the_roll_has_a_row_for_everybody() -> None:
    roll = Roll()
    pids = list(range(1, limits.PROCESSES_MAX + 1))
    for pid in pids:
        roll.add(pid)
    roll.remove(7)
    roll.add(1 << 22)
    assert {pid for pid in roll.sessions() if pid} == {*pids, 1 << 22} - {7}


@LINUX
def test_proc_tells_parent_session_and_environment() -> None:
    command = [sys.executable, "-c", "input()"]
    environment = os.environ | {"LLMOS_HOME": "/h", "LLMOS_PROCESS": "p", "LLMOS_LIFELINE_FD": "3"}
    child = subprocess.Popen(
        command, stdin=subprocess.PIPE, env=environment, start_new_session=True
    )
    try:
        row = descend.row(child.pid)
        assert row is not None
        assert (row.parent, row.session, row.zombie) == (os.getpid(), child.pid, False)
        assert row in descend.children_of_self()
        assert row in list(descend.everything())
        assert descend.variables(child.pid)[b"LLMOS_PROCESS"] == b"p"
        assert guard.carries_mark(child.pid, Path("/h"))
        assert not guard.carries_mark(child.pid, Path("/other"))
        guard.sweep({child.pid}, Path("/nobody"))
    finally:
        child.communicate()
    assert child.returncode == -9
    assert descend.row(child.pid) is None
    assert descend.variables(child.pid) == {}
