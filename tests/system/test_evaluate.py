"""Evaluation in a real system: numbers that no death changes, and what is refused."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from libllm.syncjobs import Job
from llmproto.errors import ErrorKind, RemoteError
from llmproto.jobs import JobState
from llmproto.recipes import DataRecipe

import libllm

from .conftest import System, run_llmos

MODEL = "llmos-mini"
METRICS = ["loss", "perplexity", "exact_match", "bleu", "chrf"]


def long(*case: Any) -> Any:  # Any: what a parameter set is made of
    """A case for the long suite."""
    return pytest.param(*case, marks=pytest.mark.long)


def write(path: Path, *rows: object) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def answers(tmp_path: Path) -> str:
    subjects = ("for", "if", "while", "try", "with", "return", "import", "def") * 24
    rows = [
        {"prompt": f"The {subject} statement {number}", "completion": " is used to say that."}
        for number, subject in enumerate(subjects)
    ]
    return write(tmp_path / "answers.jsonl", *rows)


def evaluate(llm: libllm.Client, data: str, metrics: list[str], **options: Any) -> Job:
    return llm.evaluate(MODEL, data=DataRecipe(train=[data], **options), metrics=metrics)


@pytest.mark.parametrize(
    "deaths",
    [
        [("evaluator", "kernel")],
        pytest.param(
            [("evaluator",), ("data",), ("executor",), ("tokenizer",), ("kernel", "data")],
            marks=pytest.mark.long,
        ),
    ],
)
def test_no_death_changes_the_numbers(
    shared: System, answers: str, deaths: list[tuple[str, ...]]
) -> None:
    with libllm.connect(shared.home.root) as llm:
        wanted = llm.evaluate(MODEL, data=answers, metrics=METRICS, output_tokens_max=8).result()
        assert sorted(wanted.metrics) == sorted(METRICS)
        for roles in deaths:
            job = llm.evaluate(MODEL, data=answers, metrics=METRICS, output_tokens_max=8)
            steps: list[int] = []
            struck: list[str] = []
            for found in job.watch():
                steps += [report.step for report in found.reports]
                if steps and not struck:
                    struck = [role for role in roles if kill(llm, role)]
            assert struck == list(roles)
            assert steps == list(range(1, found.row.steps_total + 1))
            assert job.result().metrics == wanted.metrics, roles


def kill(llm: libllm.Client, role: str) -> bool:
    """SIGKILL the first of this role; False where none lives."""
    for row in llm.ps():
        if row.role == role and row.pid is not None:
            os.kill(row.pid, signal.SIGKILL)
            return True
    return False


def test_stopping_and_going_on(shared: System, answers: str) -> None:
    with libllm.connect(shared.home.root) as llm:
        job = llm.evaluate(MODEL, data=answers, metrics=["bleu"], output_tokens_max=8)
        job.stop()
        stopped = next(look for look in job.watch() if look.row.state is JobState.SUSPENDED)
        assert stopped.row.processes == []
        job.resume()
        going = next(look for look in job.watch() if look.row.state is JobState.RUNNING)
        assert going.row.processes
        job.cancel()
        with pytest.raises(RemoteError, match="was cancelled"):
            job.result()


def test_the_command_line(shared: System, answers: str) -> None:
    home = shared.home.root
    arguments = ("eval", MODEL, "--data", answers, "--metrics", "loss", "--max-tokens", "8")
    started = run_llmos(*arguments, "--detach", home=home)
    job = started.stdout.strip()
    attached = run_llmos("attach", job, home=home)
    assert attached.returncode == 0, attached.stderr
    again = run_llmos("attach", job, "--json", home=home)
    last = json.loads(again.stdout.splitlines()[-1])
    assert last["row"]["state"] == "done"
    assert f"loss  {last['row']['metrics']['loss']:.6g}" in attached.stdout
    assert job in run_llmos("jobs", home=home).stdout


@pytest.mark.parametrize(
    ("rows", "metrics", "options", "said"),
    [
        ([{"text": "x"}], ["accuracy"], {}, "accuracy does not fit a model whose task is 'gener"),
        long([{"text": "x"}], ["bleu"], {}, "row 1 is plain text: exact_match, bleu, chrf need"),
        ([{"text": "x"}, {"text": 3}], ["loss"], {}, ":2: 'text' must be text, it is a int"),
        long([], ["loss"], {}, "holds no rows"),
        long([{"text": "word " * 2000}], ["loss"], {}, "1024"),
        long([{"text": "x"}], ["loss"], {"text": "y"}, "there is no column 'y'; there are: text"),
    ],
)
def test_what_is_refused(
    shared: System,
    tmp_path: Path,
    rows: list[object],
    metrics: list[str],
    options: dict[str, str],
    said: str,
) -> None:
    data = write(tmp_path / "bad.jsonl", *rows)
    with libllm.connect(shared.home.root) as llm:
        with pytest.raises(RemoteError) as caught:
            evaluate(llm, data, metrics, **options).result()
        assert caught.value.kind is ErrorKind.INVALID
        assert said in caught.value.detail


@pytest.mark.long
def test_files_that_are_not_there(shared: System, tmp_path: Path) -> None:
    with libllm.connect(shared.home.root) as llm:
        with pytest.raises(RemoteError) as caught:
            llm.evaluate(MODEL, data=str(tmp_path / "no.jsonl"), metrics=["loss"]).result()
        assert caught.value.kind is ErrorKind.INVALID
        assert "no.jsonl" in caught.value.detail
