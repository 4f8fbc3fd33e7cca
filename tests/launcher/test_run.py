"""The steps of the test command, with stand-ins for the tools."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

RUN = Path(__file__).resolve().parents[1] / "run.py"
TOOL = """
import os, sys
print("{name}", *sys.argv[1:], flush=True)
sys.exit("{name}" in os.environ.get("FAILING", ""))
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A checkout with the test command, beside tools that only say how they were called."""
    (tmp_path / "tests").mkdir()
    shutil.copy(RUN, tmp_path / "tests/run.py")
    tools = tmp_path / "tools"
    (tools / "importlinter").mkdir(parents=True)
    for name in ("ruff", "mypy", "pytest"):
        (tools / f"{name}.py").write_text(TOOL.format(name=name))
    (tools / "importlinter/__init__.py").touch()
    contracts = TOOL.format(name="contracts").replace("\n", "\n    ")
    (tools / "importlinter/cli.py").write_text(f"def lint_imports_command():{contracts}")
    return tmp_path


def call(root: Path, *arguments: str, failing: str = "") -> tuple[int, list[str]]:
    """Run the test command; return its exit status and what the tools said."""
    env = os.environ | {"PYTHONPATH": str(root / "tools"), "FAILING": failing}
    done = subprocess.run(
        [sys.executable, root / "tests/run.py", *arguments],
        cwd="/",
        env=env,
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout.splitlines()


def tools_called(lines: list[str]) -> list[str]:
    """The lines that tools wrote."""
    return [line for line in lines if not line.startswith(("==", " "))]


CHECKS = ["ruff format --check", "ruff check", "mypy", "contracts --no-logo"]


def test_runs_every_step_and_pytest_last(root: Path) -> None:
    status, lines = call(root)
    assert status == 0
    *checks, tests = tools_called(lines)
    assert checks == CHECKS
    assert re.fullmatch(r"pytest -q -m not long -n [1-4] --dist loadfile", tests)
    assert lines[-1] == tests
    assert sum(" ok, " in line for line in lines) == len(CHECKS)


def test_long_adds_the_campaigns_and_other_arguments_reach_pytest(root: Path) -> None:
    _, lines = call(root, "--long", "-k", "a or b", "tests/kernel")
    assert lines[-1] == "pytest -q -k a or b tests/kernel"


@pytest.mark.parametrize("failing", ["ruff", "mypy", "contracts", "pytest"])
def test_a_failed_step_stops_no_other_and_fails_the_whole(root: Path, failing: str) -> None:
    status, lines = call(root, failing=failing)
    assert status == 1
    assert len(tools_called(lines)) == len(CHECKS) + 1
    names = {"ruff": "format, lint FAILED", "mypy": "types FAILED", "contracts": "imports FAILED"}
    assert names.get(failing, "all ok") in lines[-2]
