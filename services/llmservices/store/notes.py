"""What changes of a version after it was saved: its tags, and metrics recorded later.

One small file for the tags of each name and for the metrics of each version, replaced atomically.
"""

from pathlib import Path
from typing import Final, TypeVar
from urllib.parse import quote

import msgspec

from libllm import logs
from llmservices.store.disk import Disk
from llmservices.store.index import Index
from llmservices.versions.manifest import FOLDER_DIGITS

NAMES: Final = "names"
METRICS: Final = "metrics"
T = TypeVar("T")


class Tags(msgspec.Struct, frozen=True):
    """The file of a name."""

    name: str
    tags: dict[str, str]
    """Digests by tag."""


class Metrics(msgspec.Struct, frozen=True):
    """The file of a version."""

    version: str
    metrics: dict[str, float]


class Notes:
    """Those files."""

    def __init__(self, root: Path, disk: Disk) -> None:
        self._root = root
        self._disk = disk
        for name in (NAMES, METRICS):
            (root / name).mkdir(mode=0o700, exist_ok=True)

    def load(self, index: Index) -> None:
        """Read all into the index."""
        index.forget_notes()
        for path in self._files(NAMES):
            tags = _read(path, Tags)
            if tags is not None:
                index.put_tags(tags.name, tags.tags)
        for path in self._files(METRICS):
            metrics = _read(path, Metrics)
            if metrics is not None:
                index.put_metrics(metrics.version, metrics.metrics)

    def put_tags(self, name: str, tags: dict[str, str]) -> None:
        """Durable when this returns."""
        self._replace(self._root / NAMES / f"{quote(name, safe='')}.json", Tags(name, tags))

    def put_metrics(self, digest: str, metrics: dict[str, float]) -> None:
        """Durable when this returns."""
        self._replace(self._metrics(digest), Metrics(digest, metrics))

    def drop_metrics(self, digest: str) -> None:
        """With its version."""
        self._disk.unlink(self._metrics(digest))

    def _metrics(self, digest: str) -> Path:
        return self._root / METRICS / f"{digest[:FOLDER_DIGITS]}.json"

    def _files(self, folder: str) -> list[Path]:
        found = []
        for path in sorted((self._root / folder).iterdir()):
            if path.suffix == ".json":
                found.append(path)
            else:
                self._disk.unlink(path)  # An unfinished one.
        return found

    def _replace(self, path: Path, content: Tags | Metrics) -> None:
        beside = path.with_suffix(".new")
        self._disk.unlink(beside)
        try:
            self._disk.write(beside, msgspec.json.encode(content))
            self._disk.sync(beside)
            self._disk.rename(beside, path)
        except BaseException:
            self._disk.unlink(beside)
            raise
        self._disk.sync(path.parent)


def _read(path: Path, type_: type[T]) -> T | None:
    try:
        return msgspec.json.decode(path.read_bytes(), type=type_)
    except (OSError, msgspec.DecodeError) as error:
        logs.configure("store").error("note_damaged", path=str(path), detail=str(error))
        return None
