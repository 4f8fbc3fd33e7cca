"""`python killing.py FOLDER PIECES OPERATION`: dies at every point of an operation on a store.

For n = 0, 1, ... a forked child does it and kills itself at its n-th change of the disk; then what
it left is opened anew and must hold.  Prints how many points there are.
"""

import os
import random
import shutil
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from llmproto.versions import Lineage, Save, TagSet, TensorGroup, TensorPlace, VersionKind
from llmservices.store.archive import Archive
from llmservices.store.disk import Disk
from llmservices.store.rows import resolve
from llmservices.store.upkeep import Pins, Upkeep
from llmservices.store.verifying import Verifier
from llmservices.versions.manifest import PIECE_BYTES, folder_of, read_manifest

JOB = b"12345678"


class Dying(Disk):
    """Kills this process before its n-th change."""

    def __init__(self, points: int) -> None:
        self._left = points
        self._lock = threading.Lock()

    def point(self, what: str, path: Path) -> None:
        with self._lock:
            if not self._left:
                os.kill(os.getpid(), signal.SIGKILL)
            self._left -= 1


def save(archive: Archive, buffer: Path, step: int, pieces: int) -> bytes:
    """A checkpoint of three tensors, the largest of so many pieces, the others in a pack; and then
    older ones go."""
    large = (pieces - 1) * PIECE_BYTES + 64
    content = random.Random(step).randbytes(large + 128)
    buffer.write_bytes(content)
    places = [
        TensorPlace("large", "U8", [large], 0, large),
        TensorPlace("small", "I64", [8], large, 64),
        TensorPlace("tiny", "I64", [1], large + 64, 8),
    ]
    request = Save(
        name="model",
        kind=VersionKind.CHECKPOINT,
        buffer=str(buffer),
        groups=[TensorGroup("model.safetensors", places)],
        files=["config.json", "state.json", "1_Pooling/config.json"],
        lineage=Lineage(job=JOB, step=step),
    )
    version = archive.save(request, [b"{}", b'{"step": %d}' % step, b"{ }"]).version
    Upkeep(archive, Pins()).retire(JOB, 1)
    return version


def tag(archive: Archive, buffer: Path, step: int, pieces: int) -> bytes:
    version = bytes.fromhex(archive.index.checkpoints(JOB.hex())[0])
    Upkeep(archive, Pins()).set_tag(TagSet(f"@{version.hex()}", "prod"))
    return version


OPERATIONS: dict[str, Callable[[Archive, Path, int, int], bytes]] = {"save": save, "tag": tag}


def check(archive: Archive, before: bytes, wanted: bytes) -> None:
    """Every version verifies, the previous one is there; a collection leaves no garbage."""
    entries = archive.index.all()
    assert before.hex() in {entry.digest for entry in entries}
    assert not archive.damaged
    Upkeep(archive, Pins()).collect(living=None)
    entries = archive.index.all()
    assert {entry.digest for entry in entries} >= {before.hex()}
    verified = Verifier(archive.root).verify(entries, {})
    assert not verified.damage, verified.damage
    assert not list((archive.root / "tmp").iterdir())
    folders = [folder_of(archive.root, bytes.fromhex(entry.digest)) for entry in entries]
    needed = {name for folder in folders for name in read_manifest(folder)[0].objects()}
    assert {path.name for path in (archive.root / "objects").glob("*/*")} == needed
    assert set((archive.root / "versions").iterdir()) == set(folders)
    assert not list((archive.root / "names").glob("*.new"))
    tags = archive.index.tags("model")
    assert tags in ({}, {"prod": wanted.hex()}), tags


def main() -> None:
    folder, pieces, operation = Path(sys.argv[1]), int(sys.argv[2]), OPERATIONS[sys.argv[3]]
    threads = int(sys.argv[4])
    buffer, base, work = folder / "buffer", folder / "base", folder / "work"
    archive = Archive(base, threads=threads)
    save(archive, buffer, 1, pieces)
    before = save(archive, buffer, 2, pieces)
    archive.index.close()
    points = 0
    while True:
        shutil.copytree(base, work)
        child = os.fork()
        if not child:
            dying = Archive(work, disk=Dying(points), threads=threads)
            operation(dying, buffer, 3, pieces)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        again = Archive(work, threads=threads)
        if os.WIFSIGNALED(status):
            assert os.WTERMSIG(status) == signal.SIGKILL
            wanted = before if operation is tag else b""
            check(again, before, wanted)
            version = operation(again, buffer, 3, pieces)
            assert resolve(again.index, f"@{version.hex()}").digest == version.hex()
            check(again, before, wanted)
        again.index.close()
        shutil.rmtree(work)
        if not os.WIFSIGNALED(status):
            assert os.WEXITSTATUS(status) == 0
            print(points)
            return
        points += 1


if __name__ == "__main__":
    main()
