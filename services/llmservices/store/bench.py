"""`python -m llmservices.store.bench`: what saving and loading a version cost, measured in pairs.

save: a version out of shared memory, durable, against one file of the same bytes, written and
synced.  load: a version's tensors, every byte compared, against reading a file of the same bytes
into memory of one's own; both from the page cache.  Prints medians and ratios (ours / theirs, in
bytes a second) as JSON.
"""

import argparse
import functools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from llmproto.versions import Save, Saved, TensorGroup, TensorPlace, VersionKind

from llmservices.store.archive import Archive
from llmservices.store.disk import Disk
from llmservices.store.upkeep import Pins, Upkeep
from llmservices.versions.manifest import MODEL_WEIGHTS, folder_of
from llmservices.versions.weights import read_tensors

MEMORY: Final = Path("/dev/shm")
MIB: Final = 1 << 20
SIZES: Final = (64 * MIB, *[4 * MIB] * 30, *[MIB // 4] * 60, *[4096] * 60)
"""Of a model's tensors: an embedding, matrices, small matrices, norms: 200 MB."""
PAGE: Final = 4096


class Buffer:
    """A file of shared memory with the tensors, other ones every time."""

    def __init__(self, path: Path, scale: float) -> None:
        self.path = path
        self.places: list[TensorPlace] = []
        at = 0
        for number, size in enumerate(SIZES):
            size = max(64, int(size * scale) // 64 * 64)
            self.places.append(TensorPlace(f"t{number}", "F32", [size // 4], at, size))
            at += size
        self.bytes = at
        path.write_bytes(os.urandom(at))
        self._time = 0

    def change(self) -> None:
        """Every page has another content."""
        self._time += 1
        with self.path.open("r+b") as file:
            for at in range(0, self.bytes, PAGE):
                os.pwrite(file.fileno(), self._time.to_bytes(8, "little"), at)


def seconds(call: Callable[[], object]) -> float:
    """How long it takes."""
    before = time.perf_counter()
    call()
    return time.perf_counter() - before


def write_and_sync(content: bytes, target: Path) -> None:
    """The same bytes as one file, durable."""
    disk = Disk()
    disk.write(target, content)
    disk.sync(target)
    disk.sync(target.parent)


def read_file(path: Path) -> bytearray:
    """Into memory of one's own."""
    content = bytearray(path.stat().st_size)
    with path.open("rb", buffering=0) as file:
        file.readinto(content)
    return content


def save(archive: Archive, buffer: Buffer) -> Saved:
    """A version."""
    group = TensorGroup(MODEL_WEIGHTS, buffer.places)
    request = Save("bench", VersionKind.MODEL, str(buffer.path), [group], files=["config.json"])
    return archive.save(request, [b"{}"])


def measure(folder: Path, buffer: Buffer, pairs: int) -> dict[str, object]:
    """All figures."""
    archive = Archive(folder / "store")
    plain = folder / "plain"
    taken: dict[str, list[float]] = {name: [] for name in ("save", "write", "load", "read")}
    upkeep = Upkeep(archive, Pins())
    save(archive, buffer)  # It makes the folders.
    for _ in range(pairs):
        buffer.change()
        content = buffer.path.read_bytes()
        plain.unlink(missing_ok=True)
        upkeep.remove("bench", in_table={})
        os.sync()
        taken["write"].append(seconds(functools.partial(write_and_sync, content, plain)))
        os.sync()
        taken["save"].append(seconds(lambda: save(archive, buffer)))
    version = folder_of(archive.root, save(archive, buffer).version)
    for _ in range(pairs):
        taken["read"].append(seconds(lambda: read_file(plain)))
        taken["load"].append(seconds(lambda: read_tensors(version)))
    medians = {name: statistics.median(times) for name, times in taken.items()}
    return {
        "bytes": buffer.bytes,
        "tensors": len(buffer.places),
        "pairs": pairs,
        "seconds": {name: [round(one, 4) for one in times] for name, times in taken.items()},
        "median_mb_a_second": {
            name: round(buffer.bytes / 1e6 / median, 1) for name, median in medians.items()
        },
        "save_ratio": _ratio(taken["write"], taken["save"]),
        "load_ratio": _ratio(taken["read"], taken["load"]),
    }


def _ratio(theirs: list[float], ours: list[float]) -> float:
    """Median of the pairs' ratios."""
    return round(statistics.median(a / b for a, b in zip(theirs, ours)), 3)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="llmservices.store.bench", description=__doc__)
    parser.add_argument("--folder", type=Path, help="on the disk to be measured; it is emptied")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--scale", type=float, default=1.0, help="of the 200 MB")
    said = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(dir=said.folder) as name,
        tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as memory,
    ):
        buffer = Buffer(Path(memory) / "buffer", said.scale)
        print(json.dumps({"store": measure(Path(name), buffer, said.pairs)}, indent=1))


if __name__ == "__main__":
    main()
