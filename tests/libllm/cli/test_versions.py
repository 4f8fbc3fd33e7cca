"""Commands on versions and deployments, against a system that is made of values."""

from pathlib import Path

import pytest
from libllm.versions import ANY_TAG
from llmproto.versions import Damage

from .conftest import VERSION, CommandLine, FakeSystem, entry, pieces_of


def test_import(llmos: CommandLine, system: FakeSystem, tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    system.runs = False
    done = llmos("import", str(tmp_path / "m"), "bot")
    assert done.stdout == "bot@3f2a0b1c: 3.0 MB, 1.0 kB of it new\n"
    assert system.did[0] == ("boot", 60.0)  # as `run` does
    assert system.operator.asked == [("import", tmp_path / "m", "bot", None)]
    assert "there is no folder" in llmos("import", str(tmp_path / "x"), "bot").stderr


@pytest.mark.parametrize(
    ("command", "asked", "said"),
    [
        ("export bot out", ("export", "bot", "out", True), "bot is in out"),
        ("export bot out --adapter", ("export", "bot", "out", False), "bot is in out"),
        ("tag bot@3f2a prod", ("tag", "bot@3f2a", "prod", ANY_TAG), "prod stands on bot@3f2a"),
        ("tag bot p --expect @aabb", ("tag", "bot", "p", "@aabb"), "p stands on bot"),
        ("tag bot p --expect -", ("tag", "bot", "p", None), "p stands on bot"),
        ("untag bot:prod", ("untag", "bot", "prod"), "bot:prod is removed"),
        (
            "deploy bot:prod",
            ("deploy", "bot:prod", None, 1, None, "", True),
            "bot serves bot@3f2a0b1c",
        ),
        (
            "deploy bot --name live --replicas 2 --device cuda --if accuracy>=0.87 --no-wait",
            ("deploy", "bot", "live", 2, "cuda", "accuracy>=0.87", False),
            "live is to serve bot@3f2a0b1c",
        ),
        ("undeploy bot", ("undeploy", "bot"), "bot serves nothing"),
        ("rollback bot", ("rollback", "bot", True), "bot serves bot@3f2a0b1c"),
    ],
)
def test_what_is_asked_and_said(
    llmos: CommandLine, system: FakeSystem, command: str, asked: object, said: str
) -> None:
    done = llmos(*command.split())
    assert (done.code, done.stdout) == (0, f"{said}\n")
    assert system.operator.asked == [asked]
    assert isinstance(llmos(*command.split(), "--json").document(), dict)


@pytest.mark.parametrize("command", ["export a b", "tag a b", "rollback a", "undeploy a", "gc"])
def test_nothing_is_booted_for_what_only_makes_sense_in_a_running_system(
    llmos: CommandLine, system: FakeSystem, command: str
) -> None:
    system.runs = False
    done = llmos(*command.split())
    assert done.code == 1
    assert done.stderr.startswith("llmos: UNAVAILABLE: no system runs")
    assert done.stderr.count("\n") == 1


def test_verify_names_what_is_damaged(llmos: CommandLine, system: FakeSystem) -> None:
    done = llmos("verify")
    assert (done.code, done.stdout) == (0, "1 versions, 9 objects, 1.0 MB: all is well\n")
    where = ("model.safetensors", "w", "/store/objects/ab/abcd", "another BLAKE3 than its name")
    system.operator.damage = [Damage(VERSION.reference, *where)]
    done = llmos("verify", "bot")
    assert done.code == 1
    first, last = done.stdout.splitlines()
    assert first == (
        "bot@3f2a0b1c: model.safetensors w: another BLAKE3 than its name (/store/objects/ab/abcd)"
    )
    assert last.endswith("1 damaged")
    assert llmos("verify", "--json").code == 1


def test_gc(llmos: CommandLine) -> None:
    assert llmos("gc").stdout == "removed 3 objects, 1.0 MB, and 1 superseded checkpoints\n"


def test_a_tag_is_named_with_its_model(llmos: CommandLine) -> None:
    done = llmos("untag", "prod")
    assert done.code == 2
    assert "does not read NAME:TAG" in done.stderr


def test_run_takes_the_name_of_a_deployment(llmos: CommandLine, system: FakeSystem) -> None:
    system.operator.table.append(entry(VERSION.reference))
    system.operator.streams = [pieces_of("hi")]
    assert llmos("run", "bot", "hello").stdout.startswith("hi")
    assert system.operator.generations[0].options.get("model") == "bot"
