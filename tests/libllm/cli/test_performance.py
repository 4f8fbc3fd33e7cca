"""The demonstration against a system of values: it kills, waits, compares and cleans up."""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from libllm.cli import performance
from libllm.config import Home, SystemConfig
from libllm.results import Piece
from llmproto.errors import RemoteError

from .conftest import CommandLine, FakeSystem, Pieces, pieces_of, process

WORDS = [f" {number}" for number in range(performance.TOKENS)]


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """The command handles signals as Ctrl-C; the test process shall not."""
    numbers = (signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.fixture
def victims(system: FakeSystem) -> Iterator[list["subprocess.Popen[bytes]"]]:
    """Two processes that stand for an executor and a kernel."""
    wait = [sys.executable, "-c", "import signal; signal.pause()"]
    made = [subprocess.Popen(wait) for _ in range(2)]
    system.operator.rows = [
        process("kernel", "kernel", made[0].pid),
        process("executor-1", "executor", made[1].pid),
    ]
    system.runs = False
    yield made
    for victim in made:
        victim.kill()
        victim.wait()


def homes_left(system: FakeSystem) -> list[Path]:
    """Temporary homes that were not removed."""
    return [home.root for home in system.homes if home.root.exists()]


def test_it_kills_two_and_compares(
    llmos: CommandLine, system: FakeSystem, victims: list["subprocess.Popen[bytes]"]
) -> None:
    system.operator.streams = [pieces_of(*WORDS), pieces_of(*WORDS)]
    done = llmos("demo")
    assert done.code == 0, done.stderr
    assert [victim.wait() for victim in victims] == [-signal.SIGKILL] * 2
    assert done.stdout.count("SIGKILL") == 2
    assert done.stdout.count("goes on after") == 2
    assert done.stdout.count("$ llmos ps") == 2
    assert "both texts are equal" in done.stdout
    assert system.did[-1] == "stop"
    assert homes_left(system) == []


def test_a_document(
    llmos: CommandLine, system: FakeSystem, victims: list["subprocess.Popen[bytes]"]
) -> None:
    system.operator.streams = [pieces_of(*WORDS), pieces_of(*WORDS)]
    document = json.loads(llmos("demo", "--json").stdout)
    assert document["equal"] is True
    assert [kill["process"] for kill in document["kills"]] == ["executor-1", "kernel"]


def test_a_difference_is_shown_and_exit_code_1(
    llmos: CommandLine, system: FakeSystem, victims: list["subprocess.Popen[bytes]"]
) -> None:
    system.operator.streams = [pieces_of(*WORDS), pieces_of(*WORDS[:-1], " other")]
    done = llmos("demo")
    assert done.code == 1
    assert "the disturbed text differs from the undisturbed one" in done.stderr
    assert homes_left(system) == []


def test_a_stream_that_ends_early_is_a_failure(
    llmos: CommandLine, system: FakeSystem, victims: list["subprocess.Popen[bytes]"]
) -> None:
    system.operator.streams = [pieces_of(*WORDS[:100])]
    done = llmos("demo")
    assert done.code == 1
    assert "the stream ended before its 2 kills were survived" in done.stderr


def test_an_interruption_cleans_up(llmos: CommandLine, system: FakeSystem) -> None:
    system.operator.streams = [Pieces([Piece(text="x", tokens=1), KeyboardInterrupt()])]
    done = llmos("demo")
    assert done.code == 130
    assert signal.getsignal(signal.SIGTERM) is signal.default_int_handler
    assert system.did[-1] == "stop"
    assert homes_left(system) == []


def test_its_configuration_is_valid(tmp_path: Path) -> None:
    home = Home(tmp_path)
    home.config.write_text(performance.CONFIG)
    config = SystemConfig.read(home.config)
    assert (config.executor.mode, config.gateway.port) == ("exact", 0)


def test_equal_texts_are_no_error() -> None:
    performance.require_equal("same", "same")
    with pytest.raises(RemoteError, match="from character 2 of 3"):
        performance.require_equal("ab", "abc")
