"""What `./llmos test` runs: format, lint, types, import contracts, tests.

Every step runs, whatever has failed before it. pytest runs last and prints the last lines,
which continuous integration reads. Uses the standard library alone, and the interpreter that it
was started with for every tool.
"""

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

WORKERS = min(4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2)
"""Test files at once, where the whole suite runs."""

# import-linter has no module to start with -m, and its script breaks when a checkout moves.
LINT_IMPORTS = "from importlinter.cli import lint_imports_command as main; main()"

CHECKS: dict[str, Sequence[str]] = {
    "format": ("-m", "ruff", "format", "--check"),
    "lint": ("-m", "ruff", "check"),
    "types": ("-m", "mypy"),
    "imports": ("-c", LINT_IMPORTS, "--no-logo"),
}


def pytest_step(arguments: Sequence[str]) -> list[str]:
    """The pytest call for the caller's arguments; `--long` is ours and adds the campaigns."""
    passed_on = [argument for argument in arguments if argument != "--long"]
    selection = [] if "--long" in arguments else ["-m", "not long"]
    beside = [] if passed_on else ["-n", str(WORKERS), "--dist", "loadfile"]
    return ["-m", "pytest", "-q", *selection, *beside, *passed_on]


def passes(name: str, step: Sequence[str]) -> bool:
    """Run one step from the root, saying its name, verdict and duration."""
    print(f"== {name}", flush=True)
    started = time.monotonic()
    code = subprocess.run([sys.executable, *step], cwd=ROOT, check=False).returncode
    verdict = "ok" if code == 0 else f"FAILED (exit {code})"
    print(f"   {name}: {verdict}, {time.monotonic() - started:.1f} s", flush=True)
    return code == 0


def main(arguments: Sequence[str]) -> int:
    """Run every step; 0 when all have passed, else 1."""
    failed = [name for name, step in CHECKS.items() if not passes(name, step)]
    print(
        f"== tests   (before them: {', '.join(failed) + ' FAILED' if failed else 'all ok'})",
        flush=True,
    )
    tests = subprocess.run([sys.executable, *pytest_step(arguments)], cwd=ROOT, check=False)
    return 1 if failed or tests.returncode else 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
