"""The cache: whole or absent on a full disk, after a death, at its bound."""

import errno
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from llmproto.errors import ErrorKind, RemoteError
from llmproto.recipes import DataRecipe
from llmservices.data.cache import Cache, Contents, disk
from llmservices.data.plans import Maker
from llmservices.data.segments import make_segment

from .conftest import Bench


@contextmanager
def small_disk(bytes_max: int) -> Iterator[None]:
    """No file may grow beyond so many bytes: the system refuses writes in the middle."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_max, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def leftovers(bench: Bench) -> list[str]:
    root = bench.root / "cache"
    return [
        str(path.relative_to(root))
        for path in root.rglob("*")
        if path.is_file() or path.name.startswith("making-")
    ]


def rows(bench: Bench, name: str = "a.jsonl", count: int = 200) -> DataRecipe:
    return DataRecipe(
        train=[bench.jsonl(name, *({"text": f"{name} row {row}"} for row in range(count)))]
    )


@pytest.mark.parametrize("bytes_max", [100, 3_000, 14_500])
def test_a_full_disk_leaves_nothing_and_the_next_try_succeeds(bench: Bench, bytes_max: int) -> None:
    recipe = rows(bench)
    with small_disk(bytes_max), pytest.raises(RemoteError) as refusal:
        bench.plan(recipe)
    assert refusal.value.kind is ErrorKind.EXHAUSTED
    assert refusal.value.retry_after_ms
    assert leftovers(bench) == []
    planned = bench.plan(recipe)
    before = leftovers(bench)
    with small_disk(bytes_max), pytest.raises(RemoteError) as refusal:
        make_segment(bench.cache, planned.plan, planned.prepared.plan, 0)
    assert refusal.value.kind is ErrorKind.EXHAUSTED
    assert leftovers(bench) == before


def test_other_failures_of_the_disk_are_not_hidden() -> None:
    with pytest.raises(RemoteError), disk():
        raise OSError(errno.ENOSPC, "full")
    with pytest.raises(OSError, match="broken"), disk():
        raise OSError(errno.EIO, "broken")


def test_rows_beyond_the_bound_push_out_the_least_recently_used(bench: Bench) -> None:
    datasets = [bench.plan(rows(bench, f"{name}.jsonl")).prepared.dataset for name in "abc"]
    folder = bench.root / "cache" / "rows"
    size = sum(file.stat().st_size for file in (folder / datasets[0]).iterdir())
    hour_ago = time.time() - 3600
    for age, name in enumerate(("b", "a", "c")):  # b is the oldest
        os.utime(folder / datasets["abc".index(name)] / "meta.json", (hour_ago + age,) * 2)
    cache = Cache(bench.root / "cache", bytes_max=3 * size + 100)
    cache.open()
    in_use = {datasets[1]}
    Maker(cache, lambda: in_use, lambda rows: None).prepare(bench.ask(rows(bench, "d.jsonl")))
    left = {path.name for path in folder.iterdir()}
    assert datasets[1] in left  # in use
    assert datasets[0] not in left
    assert datasets[2] in left


def test_rows_larger_than_the_cache_are_refused_with_both_numbers(bench: Bench) -> None:
    cache = Cache(bench.root / "small", bytes_max=1000)
    cache.open()
    with pytest.raises(RemoteError, match=r"take \d+ bytes, the cache may have 1000"):
        Maker(cache, set, lambda rows: None).prepare(bench.ask(rows(bench)))


def test_a_broken_file_is_made_anew(bench: Bench) -> None:
    first = bench.plan(rows(bench))
    (path,) = (bench.root / "cache").rglob("rows.arrow")
    content = path.read_bytes()
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 1
    path.unlink()
    path.write_bytes(flipped)
    fresh = Cache(bench.root / "cache", bytes_max=1 << 30)
    again = Maker(fresh, set, lambda rows: None).prepare(bench.ask(rows(bench)))
    assert again.prepared == first.prepared
    assert path.read_bytes() == content


KILLED = """
import os, signal, sys
from pathlib import Path
from llmproto.data import Prepare
from llmproto.recipes import DataRecipe
from llmservices.data import preparing
from llmservices.data.cache import Cache
from llmservices.data.plans import Maker

data, tokenizer, root, after = sys.argv[1:]
preparing.CHUNK_ROWS = 10
done = 0
def progress(rows):
    global done
    done += rows
    if done >= int(after):
        os.kill(os.getpid(), signal.SIGKILL)
cache = Cache(Path(root), bytes_max=1 << 30)
cache.open()
ask = Prepare(DataRecipe(train=[data]), "train", "generate", tokenizer, 64, 2, 0)
Maker(cache, set, progress).prepare(ask)
"""


@pytest.mark.parametrize("after", [10, 110])
def test_a_process_killed_in_the_middle_leaves_nothing_that_counts(
    bench: Bench, after: int
) -> None:
    recipe = rows(bench)
    root = bench.root / "cache"
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            KILLED,
            recipe.train[0],
            str(bench.tokenizer),
            str(root),
            str(after),
        ],
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == -9
    assert any(path.name.startswith("making-") for path in root.iterdir())
    fresh = Cache(root, bytes_max=1 << 30)
    fresh.open()
    assert leftovers(bench) == []
    again = Maker(fresh, set, lambda rows: None).prepare(bench.ask(recipe))
    other = Cache(bench.root / "other", bytes_max=1 << 30)
    other.open()
    undisturbed = Maker(other, set, lambda rows: None).prepare(bench.ask(recipe))
    assert again.prepared == undisturbed.prepared
    digests = [
        make_segment(cache, planned.plan, planned.prepared.plan, 0).digest
        for cache, planned in ((fresh, again), (other, undisturbed))
    ]
    assert digests[0] == digests[1]


def test_a_file_that_may_change_unseen_is_read_again(tmp_path: Path) -> None:
    contents = Contents()
    path = tmp_path / "a"
    path.write_text("one")
    first = contents.digest(path)
    status = path.stat()
    path.write_text("two")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert contents.digest(path) != first
