"""train, attach, jobs, eval: what is asked of the system, what is shown, how they end."""

import json
from pathlib import Path

import msgspec
import pytest
from llmproto.errors import ErrorKind
from llmproto.jobs import JobFound, JobState, StepReport
from llmproto.recipes import DataRecipe, Recipe

from .conftest import JOB, JOB_ROW, CommandLine, FakeSystem

ID = JOB.hex()
DONE = msgspec.structs.replace(
    JOB_ROW, step=4, state=JobState.DONE, version=bytes(range(32)), metrics={"loss": 0.5}
)
LOOKS: list[JobFound | BaseException] = [
    JobFound(JOB_ROW, [StepReport(1, 2.0, tokens=100, ms=10.0), StepReport(2, 1.5, tokens=100)]),
    JobFound(DONE, [StepReport(4, 1.0, metrics={"validation_loss": 1.25})]),
]
FLAGS = ("train", "--base", "llmos-mini", "--data", "a.jsonl", "--name", "bot")


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text('name = "bot"\nbase = "llmos-mini"\n[data]\ntrain = ["a.jsonl"]\n')
    return path


def test_a_recipe_with_flags(llmos: CommandLine, system: FakeSystem, recipe: Path) -> None:
    system.operator.looks = LOOKS
    output = llmos("train", str(recipe), "--steps", "4", "--lr", "0.1", "--set", "lora.rank=4")
    assert output.code == 1  # [lora] without method = 'lora'
    output = llmos(
        "train", str(recipe), "--steps", "4", "--lr", "0.1", "--method", "lora", "--deploy",
        "--if", "loss<2", "--set", "lora.rank=4", "--set", "training.schedule=cosine",
    )  # fmt: skip
    assert output.code == 0, output.stderr
    (asked,) = system.operator.asked
    assert isinstance(asked, Recipe)
    assert (asked.training.steps, asked.training.learning_rate) == (4, 0.1)
    assert asked.lora is not None
    assert (asked.lora.rank, asked.training.schedule) == (4, "cosine")
    assert (asked.finish.deploy, asked.finish.gate) == (True, "loss<2")
    assert "step 4: validation_loss 1.2500" in output.stdout
    assert "bot@00010203 is made, after 1m01s" in output.stdout
    assert ID in output.stderr


def test_flags_alone_boot_a_system(llmos: CommandLine, system: FakeSystem) -> None:
    system.runs = False
    system.operator.looks = LOOKS
    output = llmos(*FLAGS)
    assert output.code == 0
    assert system.did[0] == ("boot", 60.0)
    assert "booting" in output.stderr


def test_nothing_at_all_is_wrong_usage(llmos: CommandLine) -> None:
    assert llmos("train").code == 2
    assert llmos(*FLAGS, "--set", "batch").code == 2


def test_a_bad_recipe_boots_nothing(llmos: CommandLine, system: FakeSystem, recipe: Path) -> None:
    system.runs = False
    recipe.write_text(recipe.read_text() + "[training]\nepoch = 1\n")
    output = llmos("train", str(recipe))
    assert (output.code, system.did) == (1, [])
    assert "unknown key training.epoch; did you mean epochs?" in output.stderr
    assert str(recipe) in output.stderr


def test_json_is_a_line_a_look(llmos: CommandLine, system: FakeSystem) -> None:
    system.operator.looks = LOOKS
    output = llmos(*FLAGS, "--json")
    first, last = (json.loads(line) for line in output.stdout.splitlines())
    assert [report[1] for report in first["reports"]] == [2.0, 1.5]
    assert (last["row"]["state"], last["row"]["job"]) == ("done", ID)


def test_detaching(llmos: CommandLine, system: FakeSystem) -> None:
    system.operator.looks = [LOOKS[0], KeyboardInterrupt()]
    output = llmos(*FLAGS)
    assert output.code == 130
    assert f"llmos attach {ID}" in output.stderr
    output = llmos(*FLAGS, "--detach")
    assert (output.code, output.stdout) == (0, f"{ID}\n")
    assert llmos(*FLAGS, "-d", "--json").document() == {"job": ID}


def test_a_job_that_fails(llmos: CommandLine, system: FakeSystem) -> None:
    failed = msgspec.structs.replace(
        JOB_ROW, state=JobState.FAILED, error=ErrorKind.INVALID, detail="a.jsonl line 3: no label"
    )
    system.operator.looks = [JobFound(failed, [])]
    for arguments in (FLAGS, ("attach", ID), (*FLAGS, "--json")):
        output = llmos(*arguments)
        assert output.code == 1
        assert "llmos: INVALID: a.jsonl line 3: no label" in output.stderr


def test_attach(llmos: CommandLine, system: FakeSystem) -> None:
    system.operator.looks = LOOKS
    assert llmos("attach", ID).code == 0
    assert system.operator.asked == [("job", ID)]


def test_jobs(llmos: CommandLine) -> None:
    output = llmos("jobs")
    assert ID in output.stdout
    assert "2/4" in output.stdout
    rows = llmos("jobs", "--json").document()
    assert isinstance(rows, list)
    assert rows[0]["name"] == "bot"


def test_eval(llmos: CommandLine, system: FakeSystem) -> None:
    system.operator.looks = LOOKS
    output = llmos(
        "eval", "bot:prod", "--data", "/t.jsonl", "--metrics", "accuracy, f1", "--no-record",
        "--set", "data.label=y",
    )  # fmt: skip
    assert output.code == 0, output.stderr
    wanted = DataRecipe(train=["/t.jsonl"], label="y")
    assert system.operator.asked == [
        ("evaluate", "bot:prod", wanted, ["accuracy", "f1"], 256, False)
    ]
    assert "  loss  0.5" in output.stdout
    output = llmos("eval", "bot", "--data", "/t.jsonl", "--metrics", "magic")
    assert output.code == 1
    assert "unknown metric 'magic': there are loss, perplexity" in output.stderr
