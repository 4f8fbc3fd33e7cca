"""The kernels: against the plain path in Triton's interpreter, and through its compiler."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)
ROOT = Path(__file__).parents[4]


def check(program: str, *arguments: str, seconds: int, **environment: str) -> str:
    """What the program printed; it must end well."""
    paths = [ROOT, *(ROOT / name for name in ("proto", "libllm", "kernel", "services"))]
    done = subprocess.run(
        [sys.executable, "-W", "error", str(Path(__file__).with_name(program)), *arguments],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))} | environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.timeout(600)
def test_the_interpreted_kernels_give_the_plain_logits() -> None:
    check("kernel_check.py", "cpu", "short", "gemma", seconds=550, TRITON_INTERPRET="1")


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_the_interpreted_kernels_give_the_plain_logits_of_every_family() -> None:
    check("kernel_check.py", "cpu", "all", seconds=1100, TRITON_INTERPRET="1")


@pytest.mark.long
@pytest.mark.timeout(600)
def test_every_kernel_compiles_for_an_h100() -> None:
    printed = check("compile_check.py", "llama", "gemma", "odd heads", seconds=550)
    assert "_attend" in printed
