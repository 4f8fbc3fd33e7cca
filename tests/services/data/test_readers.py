"""Every kind of file gives the same rows; what is broken is named with its line."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from llmproto.errors import RemoteError
from llmservices.data.readers import files_of, read_file
from llmservices.data.rows import Bad, Raw, Values

ROWS: list[Values] = [
    {"text": 'one, "two"', "label": "a"},
    {"text": "zwei é日", "label": "b"},
    {"text": "three", "label": "a"},
]


def lines() -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in ROWS)


def as_csv(path: Path) -> None:
    path.write_text('text,label\n"one, ""two""",a\nzwei é日,b\nthree,a\n')


def as_tsv(path: Path) -> None:
    path.write_text('text\tlabel\none, "two"\ta\nzwei é日\tb\nthree\ta\n')


def as_arrow(path: Path) -> None:
    table = pa.Table.from_pylist(ROWS)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


FILES: dict[str, Callable[[Path], object]] = {
    "a.jsonl": lambda path: path.write_bytes(lines()),
    "a.jsonl.gz": lambda path: path.write_bytes(gzip.compress(lines())),
    "a.jsonl.zst": lambda path: path.write_bytes(
        zstandard.compress(lines()[:40]) + zstandard.compress(lines()[40:])
    ),
    "bom.jsonl": lambda path: path.write_bytes(b"\xef\xbb\xbf" + lines()),
    "a.json": lambda path: path.write_text(json.dumps(ROWS)),
    "a.csv": as_csv,
    "a.tsv": as_tsv,
    "a.parquet": lambda path: pq.write_table(pa.Table.from_pylist(ROWS), path),
    "a.arrow": as_arrow,
}


@pytest.mark.parametrize("name", FILES)
def test_each_kind_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    FILES[name](tmp_path / name)
    rows = list(read_file(tmp_path / name))
    assert [row.values for row in rows if isinstance(row, Raw)] == ROWS
    assert len(rows) == len(ROWS)


def test_a_datasets_folder(tmp_path: Path) -> None:
    whole = datasets.Dataset.from_list(ROWS)
    whole.save_to_disk(tmp_path / "one", num_shards=2)
    datasets.DatasetDict({"train": whole, "test": whole}).save_to_disk(tmp_path / "splits")
    for files in (
        files_of([str(tmp_path / "one")]),
        files_of([str(tmp_path / "splits")], part="train"),
        files_of([str(tmp_path / "splits" / "test")]),
    ):
        rows = [row for path in files for row in read_file(path)]
        assert [row.values for row in rows if isinstance(row, Raw)] == ROWS
    with pytest.raises(RemoteError, match="has the splits train, test: name the folder of one"):
        files_of([str(tmp_path / "splits")], part="validation")


def test_folders(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "b.jsonl").write_bytes(lines())
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines()))
    (tmp_path / "README.md").write_text("about")
    (tmp_path / ".hidden.csv").write_text("x")
    names = [path.name for path in files_of([str(tmp_path)])]
    assert names == ["a.jsonl.gz", "b.jsonl"]
    (tmp_path / "c.csv").write_text("x")
    with pytest.raises(RemoteError, match=r"holds \.csv, \.jsonl files"):
        files_of([str(tmp_path)])
    with pytest.raises(RemoteError, match="none: is not there"):
        files_of([str(tmp_path / "none")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(RemoteError, match="holds no data"):
        files_of([str(tmp_path / "empty")])


@pytest.mark.parametrize(
    ("name", "content", "line", "why"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": \n{"text": "y"}\n', 2, "is no JSON"),
        ("a.jsonl", b'{"text": "x"}\n\n[1]\n{"text": "y"}\n', 3, "must be an object"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xff"}\n{"text": "y"}\n', 2, "is no JSON"),
        ("a.csv", b"text,label\nx,a\nx,a,b\ny,a\n", 3, "3 columns, the table has 2"),
        ("a.csv", b'text,label\nx,a\n"x"y,b\ny,a\n', 3, "is no csv"),
        ("a.tsv", b"text\tlabel\nx\ta\nx\xff\tb\ny\ta\n", 3, "is not UTF-8"),
    ],
)
def test_a_malformed_row_is_named_and_the_others_are_read(
    tmp_path: Path, name: str, content: bytes, line: int, why: str
) -> None:
    (tmp_path / name).write_bytes(content)
    rows = list(read_file(tmp_path / name))
    (bad,) = [row for row in rows if isinstance(row, Bad)]
    assert bad.place.line == line
    assert why in bad.why
    texts = [row.values["text"] for row in rows if isinstance(row, Raw)]
    assert texts == ["x", "y"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.parquet", b"PAR1 no"),
        ("a.arrow", b"ARROW1 no"),
        ("a.jsonl.gz", b"\x1f\x8b no"),
        ("a.jsonl.zst", b"no zstd"),
        ("a.json", b"{"),
        ("a.txt", b"\xff\xfe"),
        ("a.exe", b"MZ"),
    ],
)
def test_a_file_that_is_not_what_its_name_says_is_named(
    tmp_path: Path, name: str, content: bytes
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RemoteError, match=name.replace(".", r"\.")):
        list(read_file(tmp_path / name))


def test_a_table_without_a_header(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_text('good film\t1\nbad "film\t0\n\nso so\t1\n')
    rows = [row for row in read_file(path) if isinstance(row, Raw)]
    assert [row.values for row in rows] == [
        {"column1": "good film", "column2": "1"},
        {"column1": 'bad "film', "column2": "0"},
        {"column1": "so so", "column2": "1"},
    ]
    assert [row.place.line for row in rows] == [1, 2, 4]
    path.write_text("phrase\tpolarity\ngood\tpos\nbad\tneg\nfine\tpos\n")
    (first, *_) = [row for row in read_file(path) if isinstance(row, Raw)]
    assert first.values == {"phrase": "good", "polarity": "pos"}
