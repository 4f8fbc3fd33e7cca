"""Events on which a kernel died, kept beside the journal for the next one to refuse."""

import traceback
from pathlib import Path
from typing import Final

import msgspec
from llmproto import wire
from llmproto.errors import RemoteError
from llmproto.execution import Stepped
from llmproto.kinds import KIND_OF

from llmkernel.events import Arrived, Event, Rejected
from llmkernel.tables import Tables

KEPT_MAX: Final = 256
_SUFFIX: Final = ".rejected"


def reject(folder: Path, tables: Tables, event: Event, error: Exception) -> None:
    """Write down what ended this kernel; called once, just before it dies."""
    folder.mkdir(mode=0o700, exist_ok=True)
    name = f"{tables.epoch:012d}"
    (folder / f"{name}.txt").write_text("".join(traceback.format_exception(error)))
    (folder / f"{name}.event").write_bytes(msgspec.msgpack.encode(event))
    found = _describe(tables, event)
    if found is not None:
        part = folder / f"{name}.part"
        part.write_bytes(msgspec.msgpack.encode(found))
        part.rename(folder / f"{name}{_SUFFIX}")


def _describe(tables: Tables, event: Event) -> Rejected | None:
    if not isinstance(event, Arrived):
        return None
    try:
        header = wire.decode_header(event.frames)
    except RemoteError:
        return None
    session = tables.sessions.by_peer.get(event.peer)
    threads: tuple[bytes, ...] = ()
    if header.kind == KIND_OF[Stepped]:
        step = wire.decode_body(header.kind, event.frames[1])
        assert isinstance(step, Stepped)
        threads = tuple(step.threads)
    return Rejected(
        message=header.id,
        process=(session.process or "") if session is not None else "",
        incarnation=session.incarnation if session is not None else 0,
        threads=threads,
    )


def read_rejected(folder: Path) -> tuple[Rejected, ...]:
    """What earlier kernels died of, oldest first; deaths on the same threads are counted."""
    paths = sorted(folder.glob(f"*{_SUFFIX}"))[-KEPT_MAX:]
    found = [msgspec.msgpack.decode(path.read_bytes(), type=Rejected) for path in paths]
    deaths: dict[bytes, int] = {}
    counted: list[Rejected] = []
    for rejected in found:
        for thread in rejected.threads:
            deaths[thread] = deaths.get(thread, 0) + 1
        most = max((deaths[thread] for thread in rejected.threads), default=1)
        counted.append(msgspec.structs.replace(rejected, deaths=most))
    return tuple(counted)
