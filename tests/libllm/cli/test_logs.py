"""Log files: rendering, the order of several files, following across rotation."""

import json
from pathlib import Path

import pytest
from libllm.cli.logfiles import Follower, LogLine, files, follow, last_lines
from llmproto.errors import RemoteError

from .conftest import CommandLine, FakeSystem


def line(second: int, event: str, **fields: object) -> str:
    stamp = f"2026-01-01T00:00:{second:02}.5Z"
    return json.dumps({"timestamp": stamp, "level": "info", "event": event, **fields})


@pytest.fixture
def folder(system: FakeSystem) -> Path:
    logs = system.folder / "logs"
    logs.mkdir()
    (logs / "kernel.log").write_text(f"{line(1, 'one')}\n{line(3, 'three', process='x')}\n")
    (logs / "executor-1.log").write_text(f"{line(2, 'two', n=5, why='so it is')}\nTraceback\n")
    return logs


def test_lines_of_all_files_in_the_order_of_time(llmos: CommandLine, folder: Path) -> None:
    assert llmos("logs").stdout.splitlines() == [
        "00:00:01.5   kernel       info    one",
        '00:00:02.5   executor-1   info    two  n=5 why="so it is"',
        "             executor-1   Traceback",
        "00:00:03.5   kernel       info    three  process=x",
    ]
    assert llmos("logs", "-n", "1").stdout.splitlines()[0].endswith("three  process=x")


def test_lines_as_documents(llmos: CommandLine, folder: Path) -> None:
    lines = [json.loads(text) for text in llmos("logs", "--json").stdout.splitlines()]
    assert [found["event"] for found in lines] == ["one", "two", "Traceback", "three"]


def test_names_choose_files(llmos: CommandLine, folder: Path) -> None:
    assert [path.stem for path in files(folder, ["executor"])] == ["executor-1"]
    assert [path.stem for path in files(folder, ["kernel"])] == ["kernel"]
    done = llmos("logs", "nosuch")
    assert done.code == 1
    assert "has no log of 'nosuch'; there are: executor-1, kernel" in done.stderr
    with pytest.raises(RemoteError):
        files(folder, ["ernel"])


def test_the_file_before_a_rotation_counts(folder: Path) -> None:
    (folder / "kernel.log.1").write_text(f"{line(0, 'zero')}\n")
    found = last_lines(files(folder, ["kernel"]), 3)
    assert [found_line.message for found_line in found] == ["zero", "one", "three  process=x"]


def test_following(folder: Path) -> None:
    follower = Follower(lambda: files(folder, []))
    assert follower.read() == []
    kernel = folder / "kernel.log"
    with kernel.open("a") as file:
        file.write(f"{line(4, 'four')}\nhalf")
    assert [found.message for found in follower.read()] == ["four"]
    with kernel.open("a") as file:
        file.write(" a line\n")
    (folder / "new.log").write_text(f"{line(5, 'five')}\n")
    assert {found.message for found in follower.read()} == {"half a line", "five"}
    kernel.write_text("")  # rotated
    assert follower.read() == []
    kernel.write_text(f"{line(6, 'six')}\n")
    assert [found.message for found in follower.read()] == ["six"]


def test_follow_pauses_between_looks(folder: Path) -> None:
    follower = Follower(lambda: files(folder, ["kernel"]))

    def pause(seconds: float) -> None:
        assert seconds > 0
        with (folder / "kernel.log").open("a") as file:
            file.write(f"{line(9, 'nine')}\n")

    assert next(follow(follower, pause)).message == "nine"


def test_a_line_of_text_is_shown_as_it_is() -> None:
    assert LogLine("kernel", "[1, 2]").message == "[1, 2]"
    assert LogLine("kernel", '{"event": "x"}').text().endswith("x")
