"""What `llmos bench` starts, and that it is there."""

import importlib.util
import json
import subprocess
import sys

import pytest
from libllm.cli.bench import PROGRAMS, What, program


@pytest.mark.parametrize("what", list(What))
def test_what_it_starts_is_there(what: What) -> None:
    assert importlib.util.find_spec(PROGRAMS[what][0]) is not None


def test_arguments_are_passed_on() -> None:
    command = program(What.OVERHEAD, ["--folder", "a b", "--repeat", "3"])
    assert command[1:] == [
        "-P",
        "-m",
        "libllm.bench",
        "overhead",
        "--folder",
        "a b",
        "--repeat",
        "3",
    ]


def test_it_measures_through_the_command_line() -> None:
    sizes = [
        "--shape",
        "tiny",
        "--streams",
        "2",
        "--context",
        "8",
        "--output",
        "4",
        "--repeat",
        "1",
        "--threads",
        "1",
        "--buffer-mib",
        "2",
        "--json",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "libllm.cli", "bench", "core", *sizes],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["figures"]) == 1
