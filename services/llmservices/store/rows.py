"""From the index to what is answered: references resolved, rows built."""

from pathlib import Path
from typing import Final

import msgspec
from llmproto.errors import RemoteError, invalid
from llmproto.versions import FileRow, Lineage, VersionKind, VersionRow, Versions, VersionsAsk

from llmservices.store.index import Entry, Index
from llmservices.versions.manifest import SHORT_DIGITS, folder_of
from llmservices.versions.reference import parse, short

SHOWN: Final = 8
ROWS_BYTES_MAX: Final = 900_000
"""Of one answer: what is left of a message beside them is its header."""


def resolve(index: Index, reference: str) -> Entry:
    """The version that a reference means; INVALID, naming what there is."""
    parsed = parse(reference)
    if parsed.digits is not None:
        found = index.starting(parsed.digits)
        if parsed.name is not None:
            found = [entry for entry in found if entry.name == parsed.name]
        if len(found) > 1:
            raise invalid(f"{reference!r} may mean {_named(found)}: give more digits")
        if not found:
            raise _unknown(index, reference, parsed.name)
        return found[0]
    assert parsed.name is not None, reference
    if parsed.tag is not None:
        tags = index.tags(parsed.name)
        entry = index.find(tags[parsed.tag]) if parsed.tag in tags else None
        if entry is None:
            there = ", ".join(tags) or "none"
            raise invalid(f"{parsed.name} has no tag {parsed.tag!r}; tags: {there}")
        return entry
    entry = index.newest(parsed.name, VersionKind.MODEL)
    if entry is None:
        raise _unknown(index, reference, parsed.name)
    return entry


def row(index: Index, root: Path, entry: Entry, *, files: bool = True) -> VersionRow:
    """All that is known of a version."""
    digest = bytes.fromhex(entry.digest)
    lineage: Lineage = entry.lineage.message()
    return VersionRow(
        version=digest,
        reference=short(entry.name, digest),
        name=entry.name,
        kind=entry.kind,
        path=str(folder_of(root, digest)),
        created_s=entry.created_ns // 1_000_000_000,
        bytes=entry.bytes,
        bytes_own=index.bytes_own(entry.digest),
        tags=index.tags_of(entry.digest),
        lineage=lineage,
        metrics={**entry.metrics, **index.metrics(entry.digest)},
        files=[FileRow(name, count) for name, count in entry.files] if files else [],
        adapter=entry.adapter,
        task=entry.task,
    )


def _unknown(index: Index, reference: str, name: str | None) -> RemoteError:
    versions, total = index.listed(name, checkpoints=True, limit=SHOWN) if name else ([], 0)
    if versions:
        kinds = "" if any(v.kind is VersionKind.MODEL for v in versions) else "checkpoints only: "
        more = f" and {total - SHOWN} more" if total > SHOWN else ""
        return invalid(f"{reference!r} is no version; {name} has {kinds}{_named(versions)}{more}")
    names = index.names()
    there = ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
    return invalid(f"{reference!r} is no version; names there are: {there or 'none'}")


def _named(entries: list[Entry]) -> str:
    return ", ".join(f"{entry.name}@{entry.digest[:SHORT_DIGITS]}" for entry in entries)


def rows(index: Index, root: Path, ask: VersionsAsk) -> Versions:
    """Newest first, as many as one answer can carry, without their files."""
    entries, total = index.listed(ask.name, checkpoints=ask.checkpoints, limit=ask.limit)
    found: list[VersionRow] = []
    used = 0
    for entry in entries:
        one = row(index, root, entry, files=False)
        used += len(msgspec.msgpack.encode(one))
        if used > ROWS_BYTES_MAX:
            break  # `total` says that there are more.
        found.append(one)
    return Versions(found, total)
