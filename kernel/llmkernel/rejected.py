"""Events on which a kernel died, kept beside the journal for the next one to refuse."""

import traceback
from pathlib import Path
from typing import Final

import msgspec
from llmproto import wire
from llmproto.encoding import Vectors
from llmproto.errors import RemoteError
from llmproto.execution import Stepped
from llmproto.kinds import KIND_OF

from llmkernel.events import Arrived, Event, Rejected
from llmkernel.tables import Tables

KEPT_MAX: Final = 256
_SUFFIX: Final = ".rejected"


def reject(folder: Path, tables: Tables, event: Event, error: Exception) -> None:
    """Write down what ended this kernel; called once, just before it dies."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    name = f"{tables.epoch:012d}"
    found = _describe(tables, event)
    if found is not None:
        _write(folder / f"{name}{_SUFFIX}", found)
    (folder / f"{name}.txt").write_text("".join(traceback.format_exception(error)))
    (folder / f"{name}.event").write_bytes(msgspec.msgpack.encode(event))


def _write(path: Path, rejected: Rejected) -> None:
    part = path.with_suffix(".part")
    part.write_bytes(msgspec.msgpack.encode(rejected))
    part.rename(path)


def _describe(tables: Tables, event: Event) -> Rejected | None:
    if not isinstance(event, Arrived):
        return None
    try:
        header = wire.decode_header(event.frames)
    except RemoteError:
        return None
    session = tables.sessions.by_peer.get(event.peer)
    threads: tuple[bytes, ...] = ()
    if header.kind in (KIND_OF[Stepped], KIND_OF[Vectors]):
        threads = _threads(header.kind, event.frames[1])
    return Rejected(
        message=header.id,
        process=(session.process or "") if session is not None else "",
        incarnation=session.incarnation if session is not None else 0,
        threads=threads,
    )


def _threads(kind: int, body: bytes) -> tuple[bytes, ...]:
    try:
        said = wire.decode_body(kind, body)
    except RemoteError:
        return ()
    assert isinstance(said, Stepped | Vectors)
    return tuple(said.threads)


def read_rejected(folder: Path, *, forget_processes: bool) -> tuple[Rejected, ...]:
    """What earlier kernels died of, oldest first; deaths on the same threads are counted.

    `forget_processes`: init is a new one, so none of the senders lives, and their names and
    incarnations will be given again.
    """
    every = sorted(folder.glob(f"*{_SUFFIX}"))
    for path in every[:-KEPT_MAX]:
        for suffix in (_SUFFIX, ".txt", ".event"):
            path.with_suffix(suffix).unlink(missing_ok=True)
    deaths: dict[bytes, int] = {}
    counted: list[Rejected] = []
    for path in every[-KEPT_MAX:]:
        rejected = msgspec.msgpack.decode(path.read_bytes(), type=Rejected)
        if forget_processes and rejected.process:
            rejected = msgspec.structs.replace(rejected, process="", incarnation=0)
            _write(path, rejected)
        for thread in rejected.threads:
            deaths[thread] = deaths.get(thread, 0) + 1
        most = max((deaths[thread] for thread in rejected.threads), default=1)
        counted.append(msgspec.structs.replace(rejected, deaths=most))
    return tuple(counted)
