"""The store dies, or finds the disk full, at every change that it makes to its disk."""

import errno
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from libllm.config import child_environment
from llmproto.errors import ErrorKind, RemoteError
from llmservices.store.archive import Archive
from llmservices.store.disk import Disk

from .saves import CONFIG, check_store, objects_on_disk, random_tensors, save_of, small_save

KILLING = Path(__file__).with_name("killing.py")
FILLING = Path(__file__).with_name("filling.py")


def killed_everywhere(folder: Path, pieces: int, operation: str, threads: int = 1) -> int:
    """How many points there were; anything that does not hold is in the exception."""
    command = [sys.executable, str(KILLING), str(folder), str(pieces), operation, str(threads)]
    done = subprocess.run(
        command, env=child_environment(), capture_output=True, text=True, timeout=3000, check=False
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_killed_at_every_point_of_a_save(tmp_path: Path) -> None:
    assert killed_everywhere(tmp_path, 2, "save") > 40


def test_killed_at_every_point_of_setting_a_tag(tmp_path: Path) -> None:
    assert killed_everywhere(tmp_path, 1, "tag") == 6


@pytest.mark.long
@pytest.mark.timeout(3000)
def test_killed_at_every_point_of_a_large_save_by_many_threads(tmp_path: Path) -> None:
    assert killed_everywhere(tmp_path, 6, "save", threads=4) > 50


class Full(Disk):
    """Has room for so many changes, and then only for removals."""

    def __init__(self, points: int) -> None:
        self._left = points
        self._lock = threading.Lock()
        self.is_full = False

    def point(self, what: str, path: Path) -> None:
        if what in {"unlink", "remove_tree"}:
            return
        with self._lock:
            self._left -= 1
            if self._left < 0:
                self.is_full = True
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def free_bytes(self, path: Path) -> int:
        return 12345


def test_a_full_disk_at_every_point_of_a_save_leaves_what_was(tmp_path: Path) -> None:
    base, work = tmp_path / "base", tmp_path / "work"
    archive = Archive(base, threads=1)
    before = small_save(archive, tmp_path / "b", 1)
    archive.index.close()
    objects = objects_on_disk(base)
    points = 0
    while True:
        shutil.copytree(base, work)
        disk = Full(points)
        full = Archive(work, disk=disk, threads=1)
        try:
            small_save(full, tmp_path / "b", 2)
        except RemoteError as error:
            assert error.kind is ErrorKind.EXHAUSTED
            assert "12345 are free" in error.detail and "4195986 bytes" in error.detail
        assert [entry.digest for entry in full.index.all()][:1] == [before.version.hex()]
        if disk.is_full:
            assert len(full.index.all()) == 1
            assert objects_on_disk(work) == objects
        check_store(full)
        full.index.close()
        shutil.rmtree(work)
        if not disk.is_full:
            break
        points += 1
    assert points > 20


class Traced(Disk):
    """Remembers what was done."""

    def __init__(self) -> None:
        self.done: list[tuple[str, str]] = []

    def point(self, what: str, path: Path) -> None:
        self.done.append((what, str(path)))


def test_nothing_gets_its_name_before_it_is_synced(tmp_path: Path) -> None:
    """What SIGKILL cannot show, and a loss of power would."""
    disk = Traced()
    archive = Archive(tmp_path / "store", disk=disk, threads=1)
    saved = small_save(archive, tmp_path / "b", 1)
    folder = str(tmp_path / "store" / "versions" / saved.version.hex()[:32])
    (visible,) = [n for n, done in enumerate(disk.done) if done == ("rename", folder)]
    before, after = disk.done[:visible], disk.done[visible + 1 :]
    synced = {path for what, path in before if what == "sync"}
    written = {path for what, path in before if what == "write"}
    assert written <= synced
    for number, (what, path) in enumerate(before):
        if what == "rename":
            parent = str(Path(path).parent)
            assert ("sync", parent) in before[number:]
    folders = {path for what, path in before if what == "make_folder"}
    parents = {str(Path(path).parent) for path in folders if "/objects/" in path}
    assert parents <= synced
    assert ("sync", str(tmp_path / "store" / "versions")) in after


def test_a_real_disk_that_is_full(tmp_path: Path) -> None:
    """A file system of 6 MB in a mount namespace of its own."""
    folder = tmp_path / "small"
    folder.mkdir()
    script = f"mount -t tmpfs -o size=6m none {folder} && exec {sys.executable} {FILLING} {folder}"
    if subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False).returncode:
        pytest.skip("no mount namespaces here")
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", script],
        env=child_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    if "permission denied" in done.stderr.lower():
        pytest.skip("nothing can be mounted here")
    assert done.returncode == 0, done.stderr
    assert "EXHAUSTED" in done.stdout and "are free" in done.stdout


def test_the_quota_refuses_with_both_numbers(tmp_path: Path) -> None:
    archive = Archive(tmp_path / "store", bytes_max=5000)
    save = save_of(tmp_path / "b", {"model.safetensors": random_tensors(1, 1000)})
    archive.save(save, [CONFIG])
    more = save_of(tmp_path / "b", {"model.safetensors": random_tensors(2, 1000)})
    with pytest.raises(RemoteError, match=r"has 4062 bytes.*needs 4000.*bytes_max is 5000") as full:
        archive.save(more, [CONFIG])
    assert full.value.kind is ErrorKind.EXHAUSTED
    check_store(archive)
