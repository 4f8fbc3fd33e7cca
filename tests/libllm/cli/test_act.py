"""kill, stop, cont, nice; add, rm, load; keys: what each asks of the system."""

from pathlib import Path

import pytest

from .conftest import THREAD, CommandLine, FakeSystem

ID = THREAD.hex()


@pytest.mark.parametrize(
    ("arguments", "asked"),
    [
        (["kill", "executor-1"], ("kill", "executor-1", 9)),
        (["kill", "executor-1", "-s", "sigterm"], ("kill", "executor-1", 15)),
        (["kill", "executor-1", "-s", "19"], ("kill", "executor-1", 19)),
        (["kill", ID], ("cancel", THREAD)),
        (["stop", ID], ("suspend", THREAD)),
        (["cont", ID], ("resume", THREAD)),
        (["nice", ID, "-n", "3"], ("renice", THREAD, 3, None)),
        (["nice", ID, "-n", "-8", "--class", "batch"], ("renice", THREAD, -8, 2)),
        (["rm", "plain"], ("remove", "plain")),
        (["load", "plain"], ("load", "plain")),
        (["load"], ("load", None)),
        (["keys", "rm", "ann"], ("remove key", "ann")),
    ],
)
def test_what_is_asked(
    llmos: CommandLine, system: FakeSystem, arguments: list[str], asked: object
) -> None:
    done = llmos(*arguments)
    assert (done.code, done.stderr) == (0, "")
    assert system.operator.asked == [asked]
    assert len(done.stdout.splitlines()) == 1
    assert isinstance(llmos(*arguments, "--json").document(), dict)


def test_priorities_and_classes_have_ranges(llmos: CommandLine) -> None:
    assert llmos("nice", ID, "-n", "8").code == 2
    assert llmos("nice", ID, "--class", "urgent").code == 2


def test_add_takes_a_folder(llmos: CommandLine, system: FakeSystem, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    assert (
        llmos("add", str(tmp_path / "model"), "--name", "mine").stdout == "added mine (generate)\n"
    )
    assert system.operator.asked == [("add", tmp_path / "model", "mine")]
    missing = llmos("add", str(tmp_path / "missing"))
    assert missing.stderr == f"llmos: INVALID: there is no folder {tmp_path / 'missing'}\n"
    (tmp_path / "file").touch()
    assert "is a file" in llmos("add", str(tmp_path / "file")).stderr


def test_a_new_key_is_all_of_standard_output(llmos: CommandLine, system: FakeSystem) -> None:
    done = llmos("keys", "add", "ann", "--operator")
    assert done.stdout == "llmos-secret\n"
    assert "ann" in done.stderr
    assert system.operator.asked == [("add key", "ann", True)]
    assert llmos("keys", "list").stdout.splitlines()[1].split()[:2] == ["ann", "use"]
