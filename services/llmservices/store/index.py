"""The index: who has which objects, in SQLite.  A cache: everything in it stands in the manifests
and in the files of tags and metrics, and is read from there when it is missing or damaged.
"""

import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import msgspec
from llmproto.versions import VersionKind

from llmservices.versions.manifest import LineageEntry, Manifest, Stamp, Stored

SCHEMA: Final = 2
_TABLES: Final = """
create table versions (
  id integer primary key, digest text unique not null, name text not null, kind text not null,
  sequence integer not null, job text, parent text, adapter integer not null, entry blob not null);
create index versions_name on versions (name, kind, sequence);
create index versions_kind on versions (kind, sequence);
create index versions_job on versions (job, sequence);
create table objects (
  id integer primary key, digest text unique not null, bytes integer not null);
create table refs (
  version integer not null, object integer not null, primary key (version, object)
) without rowid;
create index refs_object on refs (object, version);
create table tensors (
  digest blob not null, version integer not null, bytes integer not null, stored blob not null,
  primary key (digest, version)) without rowid;
create table tags (
  name text not null, tag text not null, digest text not null, primary key (name, tag));
create index tags_digest on tags (digest);
create table metrics (digest text primary key, content blob not null);
"""


class Entry(msgspec.Struct, frozen=True):
    """What is shown of a version without its manifest."""

    digest: str
    """64 hexadecimal digits."""
    name: str
    kind: VersionKind
    sequence: int
    created_ns: int
    bytes: int
    adapter: bool
    task: str
    lineage: LineageEntry
    metrics: dict[str, float]
    files: list[tuple[str, int]]
    keep: int = 1

    @classmethod
    def of(cls, digest: str, manifest: Manifest, stamp: Stamp) -> "Entry":
        files = [(file.name, file.size_bytes) for file in manifest.files]
        files += [(group.file, group.size_bytes) for group in manifest.groups]
        return cls(
            digest=digest,
            name=manifest.name,
            kind=manifest.kind,
            sequence=stamp.sequence,
            created_ns=stamp.created_ns,
            bytes=manifest.size_bytes,
            adapter=manifest.is_adapter,
            task=manifest.task,
            lineage=manifest.lineage,
            metrics=manifest.metrics,
            files=sorted(files),
            keep=stamp.keep,
        )


_entries: Final = msgspec.msgpack.Decoder(Entry)
_stored: Final = msgspec.msgpack.Decoder(Stored)
_encode: Final = msgspec.msgpack.encode


class Index:
    """One connection.  sqlite3.DatabaseError means: close it and rebuild."""

    def __init__(self, path: Path) -> None:
        """Opened, or made anew where it is missing, of another schema, or damaged."""
        self._path = path
        try:
            self._db = self._open()
        except sqlite3.DatabaseError:
            self.remove()
            self._db = self._open()

    def close(self) -> None:
        self._db.close()

    def remove(self) -> None:
        """Forget the file."""
        for suffix in ("", "-wal", "-shm"):
            self._path.with_name(self._path.name + suffix).unlink(missing_ok=True)

    def _open(self) -> sqlite3.Connection:
        db = sqlite3.connect(self._path, isolation_level=None, check_same_thread=False)
        try:
            db.execute("pragma journal_mode = wal")
            db.execute("pragma synchronous = normal")
            (schema,) = db.execute("pragma user_version").fetchone()
            (sound,) = db.execute("pragma quick_check(1)").fetchone()
            if sound != "ok" or schema not in {0, SCHEMA}:
                raise sqlite3.DatabaseError(f"schema {schema}, {sound}")
            if schema == 0:
                db.executescript(f"begin; {_TABLES} pragma user_version = {SCHEMA}; commit;")
        except BaseException:
            db.close()
            raise
        return db

    @contextlib.contextmanager
    def changing(self) -> Iterator[None]:
        """All of it or nothing."""
        self._db.execute("begin immediate")
        try:
            yield
        except BaseException:
            self._db.execute("rollback")
            raise
        self._db.execute("commit")

    # --- versions ---------------------------------------------------------------------------------

    def put(self, digest: str, manifest: Manifest, stamp: Stamp) -> Entry:
        """A version is there."""
        entry = Entry.of(digest, manifest, stamp)
        with self.changing():
            self._drop(digest)
            cursor = self._db.execute(
                "insert into versions (digest, name, kind, sequence, job, parent, adapter, entry)"
                " values (?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    digest, entry.name, entry.kind.value, entry.sequence, entry.lineage.job,
                    entry.lineage.parent, entry.adapter, _encode(entry),
                ),
            )  # fmt: skip
            version = cursor.lastrowid
            objects = manifest.objects()
            self._db.executemany(
                "insert or ignore into objects (digest, bytes) values (?, ?)", objects.items()
            )
            self._db.executemany(
                "insert into refs select ?, id from objects where digest = ?",
                ((version, name) for name in objects),
            )
            self._db.executemany(
                "insert or ignore into tensors values (?, ?, ?, ?)",
                (
                    (tensor.digest, version, tensor.size_bytes, _encode(tensor.stored))
                    for group in manifest.groups
                    for tensor in group.tensors
                    if len(tensor.objects) != 1 or tensor.pack is not None
                ),
            )
        return entry

    def drop(self, digest: str) -> list[tuple[str, int]]:
        """A version is gone: the objects that no other has, and their bytes."""
        with self.changing():
            return self._drop(digest)

    def _drop(self, digest: str) -> list[tuple[str, int]]:
        found = self._db.execute("select id from versions where digest = ?", (digest,)).fetchone()
        if found is None:
            return []
        orphans = self._db.execute(
            "select o.id, o.digest, o.bytes from refs r join objects o on o.id = r.object"
            " where r.version = ?1 and not exists"
            " (select 1 from refs x where x.object = r.object and x.version != ?1)",
            found,
        ).fetchall()
        self._db.execute("delete from refs where version = ?", found)
        self._db.execute("delete from tensors where version = ?", found)
        self._db.execute("delete from versions where id = ?", found)
        self._db.executemany("delete from objects where id = ?", ((row[0],) for row in orphans))
        return [(name, count) for _, name, count in orphans]

    def digests(self) -> set[str]:
        """Of all versions."""
        return {row[0] for row in self._db.execute("select digest from versions")}

    def find(self, digest: str) -> Entry | None:
        return self._one("where digest = ?", digest)

    def newest(self, name: str, kind: VersionKind) -> Entry | None:
        return self._one(
            "where name = ? and kind = ? order by sequence desc limit 1", name, kind.value
        )

    def starting(self, digits: str) -> list[Entry]:
        """Whose digest begins so."""
        return self._many("where digest >= ? and digest < ? limit 9", digits, digits + "g")

    def listed(self, name: str | None, *, checkpoints: bool, limit: int) -> tuple[list[Entry], int]:
        """Newest first, and how many there are in all."""
        kind = None if checkpoints else VersionKind.MODEL.value
        where = "where (?1 is null or name = ?1) and (?2 is null or kind = ?2)"
        (total,) = self._db.execute(
            f"select count(*) from versions {where}", (name, kind)
        ).fetchone()
        rows = self._many(f"{where} order by sequence desc limit ?3", name, kind, limit)
        return rows, total

    def all(self) -> list[Entry]:
        """Oldest first."""
        return self._many("order by sequence")

    def names(self) -> list[str]:
        rows = self._db.execute("select distinct name from versions order by name limit 50")
        return [row[0] for row in rows]

    def checkpoints(self, job: str) -> list[str]:
        """Of a job, newest first."""
        return [
            row[0]
            for row in self._db.execute(
                "select digest from versions where job = ? and kind = ? order by sequence desc",
                (job, VersionKind.CHECKPOINT.value),
            )
        ]

    def keep(self, digest: str) -> int:
        """How many checkpoints stay, as this one was saved with."""
        entry = self.find(digest)
        return 1 if entry is None else entry.keep

    def jobs(self) -> list[str]:
        """That have checkpoints."""
        rows = self._db.execute(
            "select distinct job from versions where kind = ? and job is not null",
            (VersionKind.CHECKPOINT.value,),
        )
        return [row[0] for row in rows]

    def adapters_of(self, digest: str) -> list[str]:
        """Versions that are adapters of this one."""
        rows = self._db.execute(
            "select digest from versions where parent = ? and adapter", (digest,)
        )
        return [row[0] for row in rows]

    def sequence(self) -> int:
        """The highest."""
        (found,) = self._db.execute("select coalesce(max(sequence), 0) from versions").fetchone()
        return int(found)

    def _one(self, rest: str, *values: object) -> Entry | None:
        found = self._many(rest, *values)
        return found[0] if found else None

    def _many(self, rest: str, *values: object) -> list[Entry]:
        rows = self._db.execute(f"select entry from versions {rest}", values)
        return [_entries.decode(row[0]) for row in rows]

    # --- objects ----------------------------------------------------------------------------------

    def tensor(self, digest: bytes, size_bytes: int) -> Stored | None:
        """Where a tensor lies that some version has; of several places the oldest."""
        if self.has_object(digest.hex()):
            return Stored([digest.hex()])
        found = self._db.execute(
            "select stored from tensors where digest = ? and bytes = ? order by version limit 1",
            (digest, size_bytes),
        ).fetchone()
        return None if found is None else _stored.decode(found[0])

    def has_object(self, name: str) -> bool:
        row = self._db.execute("select 1 from objects where digest = ?", (name,)).fetchone()
        return row is not None

    def bytes_total(self) -> int:
        """Of all objects that versions need."""
        (found,) = self._db.execute("select coalesce(sum(bytes), 0) from objects").fetchone()
        return int(found)

    def bytes_own(self, digest: str) -> int:
        """Of objects that no other version has."""
        (found,) = self._db.execute(
            "select coalesce(sum(o.bytes), 0) from versions v join refs r on r.version = v.id"
            " join objects o on o.id = r.object where v.digest = ? and not exists"
            " (select 1 from refs x where x.object = r.object and x.version != v.id)",
            (digest,),
        ).fetchone()
        return int(found)

    # --- tags and metrics -------------------------------------------------------------------------

    def put_tags(self, name: str, tags: dict[str, str]) -> None:
        """All tags of a name."""
        with self.changing():
            self._db.execute("delete from tags where name = ?", (name,))
            self._db.executemany(
                "insert into tags values (?, ?, ?)",
                ((name, tag, digest) for tag, digest in tags.items()),
            )

    def tags(self, name: str) -> dict[str, str]:
        rows = self._db.execute("select tag, digest from tags where name = ? order by tag", (name,))
        return dict(rows.fetchall())

    def tags_of(self, digest: str) -> list[str]:
        rows = self._db.execute("select tag from tags where digest = ? order by tag", (digest,))
        return [row[0] for row in rows]

    def put_metrics(self, digest: str, metrics: dict[str, float]) -> None:
        """Recorded after the save."""
        self._db.execute("insert or replace into metrics values (?, ?)", (digest, _encode(metrics)))

    def metrics(self, digest: str) -> dict[str, float]:
        found = self._db.execute(
            "select content from metrics where digest = ?", (digest,)
        ).fetchone()
        return {} if found is None else msgspec.msgpack.decode(found[0], type=dict[str, float])

    def forget_notes(self) -> None:
        """Tags and metrics are read anew."""
        with self.changing():
            self._db.execute("delete from tags")
            self._db.execute("delete from metrics")
