"""What happens to versions after they were saved: tags, metrics, removal, collection.

Used by the one thread that changes the store.  A version is removed by one rename of its folder;
its objects go afterwards, those that no other version has.
"""

import contextlib
import threading
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from llmproto.errors import ErrorKind, RemoteError, invalid
from llmproto.versions import Collected, TagRemove, TagSet

from llmservices.store import core
from llmservices.store.archive import Archive
from llmservices.store.index import Entry
from llmservices.store.rows import resolve
from llmservices.versions.manifest import OBJECTS, VERSIONS, folder_of, object_path
from llmservices.versions.reference import check_name


class Pins:
    """Versions that somebody reads just now: they are not removed.  Safe for threads."""

    def __init__(self) -> None:
        self._held: Counter[str] = Counter()
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def hold(self, *digests: str) -> Iterator[None]:
        """As long as this lasts."""
        with self._lock:
            self._held.update(digests)
        try:
            yield
        finally:
            with self._lock:
                self._held.subtract(digests)

    def __contains__(self, digest: str) -> bool:
        with self._lock:
            return self._held[digest] > 0


class Upkeep:
    """Of one archive."""

    def __init__(self, archive: Archive, pins: Pins) -> None:
        self._archive = archive
        self._pins = pins

    def set_tag(self, message: TagSet) -> None:
        """Compare and swap; STALE, naming what the tag stands on, where it is not as expected."""
        index = self._archive.index
        entry = resolve(index, message.reference)
        tags = index.tags(entry.name)
        core.check_swap(
            f"{entry.name}:{message.tag}",
            tags.get(message.tag),
            expected=message.expected.hex() if message.expected else None,
            compare=message.compare,
        )
        self._put_tags(entry.name, {**tags, message.tag: entry.digest})

    def remove_tag(self, message: TagRemove) -> None:
        """INVALID where it is not there."""
        name = check_name(message.name)
        tags = self._archive.index.tags(name)
        if message.tag not in tags:
            raise invalid(f"{name} has no tag {message.tag!r}; tags: {', '.join(tags) or 'none'}")
        del tags[message.tag]
        self._put_tags(name, tags)

    def record(self, reference: str, metrics: Mapping[str, float]) -> None:
        """These belong to the version from now on, instead of earlier ones of the same names."""
        index = self._archive.index
        digest = resolve(index, reference).digest
        merged = {**index.metrics(digest), **core.check_metrics(metrics)}
        self._archive.notes.put_metrics(digest, merged)
        index.put_metrics(digest, merged)

    def remove(self, reference: str, *, in_table: Mapping[bytes, str]) -> None:
        """Forget a version; INVALID while something stands on it.  `in_table`: versions in the
        kernel's model table, by digest."""
        index = self._archive.index
        damaged = self._damaged(reference)
        if damaged is not None:
            self._discard(damaged)
            del self._archive.damaged[damaged.name]
            return
        entry = resolve(index, reference)
        served = in_table.get(bytes.fromhex(entry.digest))
        if served is not None:
            raise invalid(f"{reference} is in the model table as {served}: undeploy it first")
        tags = index.tags_of(entry.digest)
        if tags:
            raise invalid(f"{reference} has the tags {', '.join(tags)}: remove them first")
        adapters = index.adapters_of(entry.digest)
        if adapters:
            raise invalid(
                f"{reference} is the base of {len(adapters)} adapters, @{adapters[0][:8]} among "
                "them: remove those first"
            )
        if entry.digest in self._pins:
            raise RemoteError(
                ErrorKind.UNAVAILABLE, f"{reference} is being read", retry_after_ms=1000
            )
        self._remove(entry)

    def retire(self, job: bytes, keep: int) -> int:
        """Remove what a job's newer checkpoints supersede; how many went."""
        found = self._archive.index.checkpoints(job.hex())
        return self._remove_checkpoints(core.superseded(found, keep=keep))

    def collect(self, *, living: Collection[str] | None, wanted: Collection[str] = ()) -> Collected:
        """Remove checkpoints that are superseded, or whose job the kernel knows no more (`living`:
        the jobs that it may continue; None: it could not be asked), and objects that no version
        has.  `wanted` are digests of checkpoints from which the kernel would continue."""
        index = self._archive.index
        before = index.bytes_total()
        removed = 0
        for job in index.jobs():
            found = index.checkpoints(job)
            over = living is not None and job not in living
            keep = index.keep(found[0])
            stale = found if over else core.superseded(found, keep=keep)
            removed += self._remove_checkpoints([name for name in stale if name not in wanted])
        objects, freed = self._sweep()
        gone = before - index.bytes_total()
        return Collected(objects, freed + gone, removed)

    def _remove_checkpoints(self, digests: list[str]) -> int:
        removed = 0
        for digest in digests:
            entry = self._archive.index.find(digest)
            if entry is None or digest in self._pins or self._archive.index.tags_of(digest):
                continue
            self._remove(entry)
            removed += 1
        return removed

    def _remove(self, entry: Entry) -> None:
        archive = self._archive
        self._discard(folder_of(archive.root, bytes.fromhex(entry.digest)))
        for name, _ in archive.index.drop(entry.digest):
            archive.disk.unlink(object_path(archive.root, name))
        archive.notes.drop_metrics(entry.digest)

    def _discard(self, folder: Path) -> None:
        disk, gone = self._archive.disk, self._archive.new_tmp()
        disk.rename(folder, gone)
        disk.sync(folder.parent)
        disk.remove_tree(gone)

    def _damaged(self, reference: str) -> Path | None:
        """A folder whose manifest is damaged, by the digits of its name."""
        digits = reference.rpartition("@")[2]
        found = [name for name in self._archive.damaged if name.startswith(digits)]
        return self._archive.root / VERSIONS / found[0] if len(found) == 1 else None

    def _sweep(self) -> tuple[int, int]:
        """Remove objects that no version has; how many, and their bytes."""
        archive = self._archive
        if archive.damaged:
            raise invalid(
                f"the manifest of version {min(archive.damaged)} is damaged, so nobody knows which "
                "objects it needs: restore it, or remove that version (@digits), then collect"
            )
        count = freed = 0
        for folder in sorted((archive.root / OBJECTS).iterdir()):
            for path in sorted(folder.iterdir()):
                if not archive.index.has_object(path.name):
                    freed += path.stat().st_size
                    count += 1
                    archive.disk.unlink(path)
        return count, freed

    def _put_tags(self, name: str, tags: dict[str, str]) -> None:
        self._archive.notes.put_tags(name, tags)
        self._archive.index.put_tags(name, tags)
