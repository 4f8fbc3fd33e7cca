"""The command line as its users run it: real processes, exit codes, both streams."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from libllm.config import Home
from llmproto.operation import ThreadState

import libllm

from .conftest import Boot, System, run_llmos

MODEL = "llmos-mini"
WAIT_S = 60.0
AT_A_TERMINAL = """
import runpy, signal
# What a shell puts into the background, and all its descendants, ignores Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)
runpy.run_module("libllm.cli", run_name="__main__", alter_sys=True)
"""


def until(what: Callable[[], object], *, seconds: float = WAIT_S) -> None:
    """Until it is so; asserts that it comes to that."""
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.02)


@contextmanager
def llmos(*arguments: str, home: Path) -> Iterator[subprocess.Popen[str]]:
    """A command under way, whose Ctrl-C works as at a terminal; killed in the end."""
    process = subprocess.Popen(
        [sys.executable, "-c", AT_A_TERMINAL, *arguments],
        env={**os.environ, "LLMOS_HOME": str(home)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def interrupted(process: subprocess.Popen[str]) -> None:
    """Ctrl-C ends it with the exit code of an interruption, and without a traceback."""
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=WAIT_S)
    assert process.returncode == 130, said
    assert "Traceback" not in said


def document(system: System, *arguments: str) -> Any:
    """What the command prints with --json: one document."""
    done = run_llmos(*arguments, "--json", home=system.home.root)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def refusal(done: subprocess.CompletedProcess[str], code: int = 1) -> str:
    """The line on standard error with which a command was refused; nothing else was printed."""
    assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    if code == 1:
        assert done.stderr.startswith("llmos: ") and done.stderr.count("\n") == 1, done.stderr
    return done.stderr


def test_looking(served: System) -> None:
    """Every command that looks prints one document for programs, and lines for people."""
    rows = {row["name"]: row for row in document(served, "ps")}
    assert {"init", "kernel", "tokenizer", "monitor", "gateway"} <= set(rows)
    for row in rows.values():
        assert {"pid", "state", "incarnation", "lease", "uptime_ms"} <= set(row)
    status = document(served, "status")
    assert status["ready"] and status["http"].startswith("http://127.0.0.1:")
    shelf = document(served, "models")
    assert [row["model"]["name"] for row in shelf["models"]] == [MODEL]
    assert [shelf["deployments"], shelf["versions"]] == [[], []]
    assert document(served, "threads") == []
    assert document(served, "keys", "list") == []
    again = document(served, "up")
    assert again["booted"] is False and again["http"] == f"{status['http']}/v1"
    for command in ("ps", "status", "models", "threads", "logs", "up"):
        done = run_llmos(command, home=served.home.root)
        assert done.returncode == 0 and done.stdout and not done.stderr, (command, done.stderr)


def test_logs(served: System) -> None:
    done = run_llmos("logs", "kernel", "-n", "3", "--json", home=served.home.root)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0 and 1 <= len(lines) <= 3
    assert all("event" in line for line in lines)
    assert "there are" in refusal(run_llmos("logs", "nobody", home=served.home.root))


def test_following_logs_ends_with_an_interruption(served: System) -> None:
    with llmos("logs", "-f", home=served.home.root) as process:
        assert process.stdout is not None and process.stdout.readline()
        interrupted(process)


def test_run_prints_the_text_alone(served: System) -> None:
    asked = ("run", MODEL, "The for statement", "--max-tokens", "24", "--temperature", "0")
    first = document(served, *asked)
    assert len(first["tokens"]) == 24 and first["finish_reason"] == "length"
    assert first["usage"] == {"prompt_tokens": 4, "output_tokens": 24}
    done = run_llmos(*asked, home=served.home.root)
    assert (done.returncode, done.stdout, done.stderr) == (0, first["text"], "")


def test_ps_names_the_precision_and_the_path_in_use(served: System) -> None:
    """The same words as `models` has, which are the executor's own; of nobody else."""
    document(served, "run", MODEL, "A list", "--max-tokens", "1")
    rows = {row["name"]: row for row in document(served, "ps")}
    paths = {row["role"]: row["path"] for row in rows.values() if row["path"]}
    assert list(paths) == ["executor"]
    precision, device, kind, *_, mode = paths["executor"].split("(")[0].split()
    assert (precision, device, mode) == ("float32", "cpu", "exact")
    assert kind in ("native", "torch")
    assert paths["executor"] == document(served, "models")["models"][0]["path"]
    with libllm.connect(served.home.root) as llm:
        assert {row.path for row in llm.ps() if row.role == "executor"} == {paths["executor"]}
    assert paths["executor"] in run_llmos("ps", home=served.home.root).stdout


def test_kill(served: System) -> None:
    home = served.home.root

    def monitor() -> dict[str, Any]:
        return next(row for row in document(served, "ps") if row["name"] == "monitor")

    before = monitor()
    assert run_llmos("kill", "monitor", home=home).returncode == 0
    until(lambda: monitor()["incarnation"] > before["incarnation"])
    until(lambda: monitor()["state"] == "ready")
    assert monitor()["pid"] != before["pid"]
    said = refusal(run_llmos("kill", "nobody", home=home))
    assert "nobody" in said and "kernel, " in said
    assert "is not known" in refusal(run_llmos("kill", "00" * 8, home=home))
    assert "no signal" in refusal(run_llmos("kill", "monitor", "-s", "NONE", home=home), 2)
    assert "16 hexadecimal" in refusal(run_llmos("stop", "xyz", home=home), 2)


def test_an_interrupted_run_cancels_its_thread(served: System) -> None:
    home = served.home.root
    asked = ("run", MODEL, "A list is", "--ignore-eos", "--temperature", "0")
    with libllm.connect(home) as llm, llmos(*asked, home=home) as process:
        until(llm.threads)
        for row in llm.threads():
            llm.suspend(row.thread)
        until(lambda: [row.state for row in llm.threads()] == [ThreadState.SUSPENDED])
        interrupted(process)
        until(lambda: not llm.threads())


def test_a_reader_that_leaves_ends_run(served: System) -> None:
    """As `llmos run ... | head` does."""
    home = served.home.root
    asked = ("run", MODEL, "A list is", "--ignore-eos", "--temperature", "0")
    with libllm.connect(home) as llm, llmos(*asked, home=home) as process:
        assert process.stdout is not None
        process.stdout.close()
        process.wait(WAIT_S)
        assert process.stderr is not None
        assert (process.returncode, process.stderr.read()) == (1, "")
        until(lambda: not llm.threads())
        process.stdout = None  # or communicate() reads it


def test_an_interrupted_demonstration_leaves_nothing(tmp_path: Path) -> None:
    before = set(Path("/tmp").glob("llmos-demo-*"))
    with llmos("demo", home=tmp_path) as process:
        assert process.stdout is not None
        first = process.stdout.readline()
        root = Path(first.removeprefix("booting in ").partition(",")[0])
        assert root.name.startswith("llmos-demo-"), first
        system = System(Home.find(root))
        until(system.pids)
        interrupted(process)
        system.until_gone(seconds=5)
    assert set(Path("/tmp").glob("llmos-demo-*")) <= before
    assert not list(tmp_path.iterdir())


def test_where_nothing_runs(tmp_path: Path) -> None:
    done = run_llmos("down", home=tmp_path)
    assert done.returncode == 0 and "no system runs" in done.stdout
    assert document(System(Home.find(tmp_path)), "down")["stopped"] is False
    for command in (["ps"], ["status"], ["models"], ["threads"], ["kill", "kernel"]):
        said = refusal(run_llmos(*command, home=tmp_path))
        assert "no system runs" in said and "llmos up" in said
    assert not list(tmp_path.iterdir())


@pytest.mark.long
def test_down_and_up_again(booted: Boot) -> None:
    system = booted()
    assert document(system, "down")["stopped"] is True
    system.until_gone()
    told = document(system, "up")
    assert told["booted"] is True and told["models"] == [MODEL] and told["ready"]


@pytest.mark.long
def test_demonstration(tmp_path: Path) -> None:
    report = document(System(Home.find(tmp_path)), "demo")
    assert report["equal"] and len(report["kills"]) == 2 and report["text"]
