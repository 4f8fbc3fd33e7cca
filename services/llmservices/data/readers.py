"""Rows from files: jsonl, json, csv, tsv, parquet, Arrow, plain text, each also compressed, and
folders of them, `datasets` folders among them.

Thin: opens, decompresses, splits.  A row that cannot be read comes as Bad with its line, a file
that cannot as INVALID with its name.  Files are read piece by piece but for .json and plain text.
"""

import codecs
import contextlib
import gzip
import io
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, TextIO

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
import zstandard
from llmproto.errors import RemoteError, invalid

from llmservices.data.rows import Bad, Place, Raw
from llmservices.data.tables import read_table

STRUCTURED: Final = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow")
PLAIN: Final = (".txt", ".text", ".md")
COMPRESSED: Final = (".gz", ".zst")
JSON_BYTES_MAX: Final = 1 << 30
"""Of a .json file, which is read whole; larger data comes as jsonl."""
TEXT_BYTES_MAX: Final = 8 << 30
BATCH_ROWS: Final = 1024
STATE: Final = "state.json"
SPLITS: Final = "dataset_dict.json"


class _State(msgspec.Struct):
    """What is read of a `datasets` folder's state.json."""

    data_files: list[dict[str, str]] = msgspec.field(name="_data_files")


class _Splits(msgspec.Struct):
    splits: list[str]


def files_of(inputs: Sequence[str], *, part: str | None = None) -> list[Path]:
    """The data files behind the inputs, in order; INVALID for what is not there.

    `part` chooses the split of a `datasets` folder that has several.
    """
    found: list[Path] = []
    for name in inputs:
        path = Path(name)
        try:
            found += _folder_files(path, part) if path.is_dir() else [path]
            if not path.exists():
                raise invalid(f"{path}: is not there")
        except OSError as error:
            raise _unreadable(path, error) from None
    return found


def _folder_files(folder: Path, part: str | None) -> list[Path]:
    if (folder / SPLITS).is_file():
        splits = _json(folder / SPLITS, _Splits).splits
        if part is not None and part in splits:
            return _folder_files(folder / part, part)
        raise invalid(f"{folder}: has the splits {', '.join(splits)}: name the folder of one")
    if (folder / STATE).is_file():
        return [folder / file["filename"] for file in _json(folder / STATE, _State).data_files]
    inside = sorted(
        path
        for path in folder.rglob("*")
        if path.is_file()
        and not any(name.startswith(".") for name in path.relative_to(folder).parts)
    )
    data = [path for path in inside if suffix(path) in STRUCTURED]
    plain = [path for path in inside if suffix(path) in PLAIN]
    kinds = {suffix(path) for path in data}
    if len(kinds) > 1:
        raise invalid(f"{folder}: holds {', '.join(sorted(kinds))} files: name those to be read")
    if not data and not plain:
        raise invalid(f"{folder}: holds no data: none of {', '.join((*STRUCTURED, *PLAIN))}")
    return data or plain


def suffix(path: Path) -> str:
    """The ending that tells the kind, without the one of compression."""
    name = path.name.lower()
    for ending in COMPRESSED:
        name = name.removesuffix(ending)
    return Path(name).suffix


def read_file(
    path: Path, *, named: Sequence[str] = (), as_text: bool = False
) -> Iterator[Raw | Bad]:
    """The rows of one file; RemoteError(INVALID) where it cannot be read as what its name says.

    `named` are the columns that the recipe speaks of; `as_text` takes an unknown ending as text.
    """
    try:
        yield from _rows(path, named, as_text)
    except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
        raise _unreadable(path, error) from None
    except UnicodeDecodeError as error:
        raise invalid(f"{path}: is not UTF-8 ({error}); convert it") from None
    except pa.ArrowException as error:
        raise invalid(f"{path}: cannot be read ({str(error)[:200]})") from None


def _rows(path: Path, named: Sequence[str], as_text: bool) -> Iterator[Raw | Bad]:
    match suffix(path):
        case ".jsonl" | ".ndjson":
            yield from _jsonl(path)
        case ".json":
            yield from _json_rows(path)
        case ".csv" | ".tsv" as ending:
            # bytes that are no UTF-8 become surrogates here, and their row Bad below
            with opened(path, errors="surrogateescape") as lines:
                rows = read_table(lines, file=str(path), tabs=ending == ".tsv", named=named)
                yield from map(_decoded, rows)
        case ".parquet":
            with pq.ParquetFile(path) as file:
                yield from _batches(path, file.iter_batches(BATCH_ROWS))
        case ".arrow":
            yield from _arrow(path)
        case ending if ending in PLAIN or as_text:
            yield from _text(path)
        case ending:
            known = ", ".join((*STRUCTURED, *PLAIN))
            raise invalid(f"{path}: files ending in {ending or 'nothing'} are not known: {known}")


def opened(path: Path, *, errors: str = "strict") -> TextIO:
    """As text, decompressed, lines as they are."""
    return io.TextIOWrapper(_stream(path), encoding="utf-8-sig", errors=errors, newline="")


def _stream(path: Path) -> io.BufferedReader:
    """Decompressed."""
    name = path.name.lower()
    raw: Any  # three libraries' binary streams
    if name.endswith(".gz"):
        raw = gzip.GzipFile(path)
    elif name.endswith(".zst"):
        raw = zstandard.ZstdDecompressor().stream_reader(
            path.open("rb"), read_across_frames=True, closefd=True
        )
    else:
        raw = path.open("rb")
    return io.BufferedReader(raw, 1 << 18)


def _decoded(row: Raw | Bad) -> Raw | Bad:
    if isinstance(row, Raw):
        for cell in row.values.values():
            if isinstance(cell, str) and not cell.isascii():
                try:
                    cell.encode()
                except UnicodeEncodeError:
                    return Bad(row.place, "is not UTF-8")
    return row


def _jsonl(path: Path) -> Iterator[Raw | Bad]:
    decoder = msgspec.json.Decoder()
    with _stream(path) as lines:
        for number, line in enumerate(lines, 1):
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if not line.strip():
                continue
            place = Place(str(path), number)
            try:
                values = decoder.decode(line)
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
                yield Bad(place, f"is no JSON: {error}")
                continue
            yield _object(place, values)


def _json_rows(path: Path) -> Iterator[Raw | Bad]:
    rows = _json(path, list[object])
    for number, values in enumerate(rows, 1):
        yield _object(Place(str(path), number), values)


def _object(place: Place, values: object) -> Raw | Bad:
    if not isinstance(values, dict):
        return Bad(place, f"must be an object, it is a {type(values).__name__}")
    return Raw(place, values)


def _arrow(path: Path) -> Iterator[Raw | Bad]:
    """The stream that `datasets` writes, or a file with a footer."""
    with pa.memory_map(str(path)) as source:
        with contextlib.suppress(pa.ArrowInvalid):
            yield from _batches(path, pa.ipc.open_stream(source))
            return
        file = pa.ipc.open_file(source)
        batches = (file.get_batch(index) for index in range(file.num_record_batches))
        yield from _batches(path, batches)


def _batches(path: Path, batches: Iterable[Any]) -> Iterator[Raw | Bad]:  # pyarrow has no types
    number = 0
    for batch in batches:
        for start in range(0, batch.num_rows, BATCH_ROWS):
            for values in batch.slice(start, BATCH_ROWS).to_pylist():
                number += 1
                yield Raw(Place(str(path), number), values)


def _text(path: Path) -> Iterator[Raw | Bad]:
    with opened(path) as file:
        text = file.read(TEXT_BYTES_MAX)
        if file.read(1):
            raise invalid(f"{path}: has more than {TEXT_BYTES_MAX} characters; cut it")
    yield Raw(Place(str(path), 1), {"text": text.replace("\r\n", "\n")})


def _json(path: Path, type_: Any) -> Any:  # whatever the type says
    bytes_there = path.stat().st_size
    if bytes_there > JSON_BYTES_MAX:
        raise invalid(
            f"{path}: has {bytes_there} bytes, a .json file is read whole and may have "
            f"{JSON_BYTES_MAX}: write it as .jsonl"
        )
    try:
        with opened(path) as file:
            return msgspec.json.decode(file.read(), type=type_)
    except (msgspec.DecodeError, RecursionError) as error:
        raise invalid(f"{path}: is not the JSON that it should be: {error}") from None


def _unreadable(path: Path, error: Exception) -> RemoteError:
    why = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return invalid(f"{path}: cannot be read ({why})")
