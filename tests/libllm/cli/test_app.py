"""Errors, exit codes and what `--help` may import."""

import os
import subprocess
import sys

import pytest
from libllm.cli.app import app, describe
from libllm.version import __version__
from llmproto.errors import ErrorKind, RemoteError
from typer.testing import CliRunner

from .conftest import CommandLine, FakeSystem

COMMANDS = [
    "up",
    "down",
    "status",
    "demo",
    "run",
    "ps",
    "threads",
    "top",
    "logs",
    "models",
    "add",
    "rm",
    "load",
    "export",
    "tag",
    "untag",
    "verify",
    "gc",
    "deploy",
    "undeploy",
    "rollback",
    "train",
    "attach",
    "jobs",
    "kill",
    "stop",
    "cont",
    "nice",
    "import",
    "eval",
    "bench",
    "data",
    "keys",
]

IMPORTED = """
import sys
from libllm.cli import main
sys.argv = ["llmos", *sys.argv[1:]]
try:
    main()
except SystemExit:
    pass
heavy = {"torch", "transformers", "zmq", "rich", "uvloop", "asyncio", "huggingface_hub", "msgspec"}
print("HEAVY", sorted(heavy & set(sys.modules)))
"""


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["--version"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", IMPORTED, *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == "HEAVY []"


def test_help_lists_the_commands_in_their_order(llmos: CommandLine) -> None:
    lines = llmos("--help").stdout.partition("Commands:")[2].split("\n")
    assert [line.split()[0] for line in lines if line.startswith("  ")] == COMMANDS
    assert not any(line.endswith("...") for line in lines)


HOMELESS = ("keys", "data", "demo", "bench")  # groups, and what makes a home of its own


@pytest.mark.parametrize("command", [name for name in COMMANDS if name not in HOMELESS])
def test_every_command_takes_home_and_json(llmos: CommandLine, command: str) -> None:
    text = llmos(command, "--help").stdout
    assert "--home" in text
    assert "--json" in text


def test_version(llmos: CommandLine) -> None:
    assert llmos("--version").stdout == f"llmos {__version__}\n"


def test_a_refusal_is_one_line_and_exit_code_1(llmos: CommandLine, system: FakeSystem) -> None:
    system.runs = False
    done = llmos("ps")
    assert (done.code, done.stdout) == (1, "")
    assert done.stderr == f"llmos: UNAVAILABLE: no system runs in {system.folder}\n"


def test_wrong_usage_is_exit_code_2(llmos: CommandLine) -> None:
    assert llmos("stop", "not-a-thread").code == 2
    assert llmos("frobnicate").code == 2
    assert llmos("kill", "executor-1", "-s", "NOSUCH").code == 2


def test_an_unexpected_exception_is_not_swallowed(system: FakeSystem) -> None:
    system.operator.rows = None  # type: ignore[assignment]  # a bug
    result = CliRunner().invoke(app, ["ps"], obj=system)
    assert isinstance(result.exception, TypeError)


def test_descriptions() -> None:
    later = RemoteError(ErrorKind.EXHAUSTED, "no room\nat all", retry_after_ms=50)
    assert describe(later) == "EXHAUSTED: no room at all (try again in 50 ms)"
    assert "report" in describe(RemoteError(ErrorKind.INTERNAL, "broke"))
