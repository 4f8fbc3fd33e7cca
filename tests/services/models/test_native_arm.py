"""The instruction sets of 64-bit ARM, cross-compiled and emulated, against this machine's own.

Needs an emulator (qemu-aarch64) and a compiler: zig from the package `ziglang`, or
aarch64-linux-gnu-g++. An emulator computes what the processor would, and says nothing of its speed.
"""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from llmservices.models.native import build
from llmservices.models.native.bindings import BFLOAT16, FLOAT32, INT4, INT8, Functions

from ..executor.native_models import functions_or_skip

DRIVER = Path(__file__).with_name("native_driver.cpp")
UNITS = build.UNITS["any"] | build.UNITS["aarch64"]
EMULATORS = ("qemu-aarch64", "qemu-aarch64-static")
PROCESSORS = {
    "cortex-a72": ["neon", "baseline"],
    "neoverse-n1": ["neon_dot", "neon", "baseline"],
    "max": ["neon_bf16", "neon_dot", "neon", "baseline"],
}
"""Emulated ones, from 2015, 2018 and after 2020, and what must be found on them."""

pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]  # it compiles


def emulator() -> str:
    for name in EMULATORS:
        if found := shutil.which(name):
            return found
    pytest.skip(f"needs {EMULATORS[0]}")


def compiler() -> tuple[list[str], bool]:
    """The command of one that makes programs for ARM, and whether it is zig."""
    if importlib.util.find_spec("ziglang") is not None:
        return [sys.executable, "-m", "ziglang", "c++", "-target", "aarch64-linux-musl"], True
    if found := shutil.which("aarch64-linux-gnu-g++"):
        return [found], False
    pytest.skip("needs the package ziglang, or aarch64-linux-gnu-g++")


def flags_of(unit: str, *, zig: bool) -> list[str]:
    """zig names a processor and its extensions where others name an architecture."""
    known = "-march=armv8.2-a"
    renamed = "-mcpu=generic+v8_2a"
    return [flag.replace(known, renamed) if zig else flag for flag in UNITS[unit]]


@pytest.fixture(scope="module")
def arm_driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("arm")
    command, zig = compiler()
    emulator()
    include = ["-I", str(build.SOURCES)]
    made = []
    for source in (*(build.SOURCES / unit for unit in UNITS), DRIVER):
        own = flags_of(source.name, zig=zig) if source.name in UNITS else []
        made.append(str(folder / f"{source.name}.o"))
        compiled = [*command, *build.FLAGS, *own, "-Werror", *include, "-c", str(source)]
        subprocess.run([*compiled, "-o", made[-1]], check=True)
    linked = folder / "driver"
    subprocess.run([*command, "-static", "-pthread", *made, "-o", str(linked)], check=True)
    return linked


@pytest.fixture(scope="module")
def own_driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With this machine's library."""
    _: Functions = functions_or_skip()
    linked = tmp_path_factory.mktemp("own") / "driver"
    library = ["-I", str(build.SOURCES), str(build.LIBRARY), f"-Wl,-rpath,{build.HERE}"]
    subprocess.run(
        [build.compiler(), "-std=c++17", "-O1", str(DRIVER), *library, "-o", str(linked)],
        check=True,
    )
    return linked


def run(*command: str) -> dict[str, np.ndarray]:
    """By instruction set: logits of every step, and in the end a row of digests."""
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    found: dict[str, list[list[int]]] = {}
    for line in done.stdout.splitlines():
        words = line.split()
        if len(words) == 1:
            found[line] = rows = []
        else:
            rows.append([int(word, 16) for word in words])
    return {name: np.array(rows, np.uint32) for name, rows in found.items()}


def logits_of(rows: np.ndarray) -> np.ndarray:
    return rows[:-1].view(np.float32)


@pytest.mark.parametrize("processor", PROCESSORS)
def test_what_a_processor_has_is_found_at_run_time(arm_driver: Path, processor: str) -> None:
    words = (str(FLOAT32), str(INT8), "1")
    found = run(emulator(), "-cpu", processor, str(arm_driver), *words)
    assert list(found) == PROCESSORS[processor]


@pytest.mark.parametrize("weights", [FLOAT32, INT8, INT4])
def test_logits_are_those_of_this_machine(arm_driver: Path, own_driver: Path, weights: int) -> None:
    """Sums of integers are exact: every set of ARM gives the same bits."""
    words = (str(FLOAT32), str(weights), "2")
    own = run(str(own_driver), *words)
    expected = logits_of(own["baseline"])
    assert np.isfinite(expected).all()
    found = run(emulator(), "-cpu", "max", str(arm_driver), *words)
    assert list(found) == PROCESSORS["max"]
    for rows in found.values():
        assert np.abs(logits_of(rows) - expected).max() < 2e-5 * expected.std()
        assert np.array_equal(rows, found["baseline"])
    digests = {tuple(rows[-1]) for rows in (*found.values(), *own.values())}
    assert len(digests) == 1  # matrices are laid out alike everywhere
    assert len(set(digests.pop()[:3])) == 3


def test_bfloat16_logits_are_near_those_of_this_machine(arm_driver: Path, own_driver: Path) -> None:
    """Where rows become bfloat16 too, they are as near as those of an x86 that does the same."""
    words = (str(BFLOAT16), str(BFLOAT16), "2")
    expected = logits_of(run(str(own_driver), *words)["baseline"])
    found = run(emulator(), "-cpu", "max", str(arm_driver), *words)
    for name, rows in found.items():
        error = np.sqrt(np.square(logits_of(rows) - expected).mean()) / expected.std()
        assert error < (0.015 if name == "neon_bf16" else 1e-4)
        assert (error > 1e-4) == (name == "neon_bf16")
