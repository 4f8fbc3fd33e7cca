"""Compiles the library beside its sources: when the package is installed, never when it runs.

`python -m llmservices.models.native.build` does it by hand. Uses the standard library alone, since
the installation runs it before anything is installed. Each instruction set is compiled by itself,
and which one runs is decided on the machine that runs it.
"""

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

HERE: Final = Path(__file__).resolve().parent
SOURCES: Final = HERE / "sources"
LIBRARY: Final = HERE / "libllmnative.so"
COMPILERS: Final = ("c++", "g++", "clang++")
FLAGS: Final = (
    "-std=c++17", "-O3", "-fPIC", "-pthread", "-fvisibility=hidden", "-fno-exceptions",
    # A product and a sum may become one operation; nothing else may change a result.
    "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math",
)  # fmt: skip
_ARM: Final[dict[str, tuple[str, ...]]] = {
    "isa_neon.cpp": (),
    "isa_neon_dot.cpp": ("-march=armv8.2-a+dotprod",),
    "isa_neon_bf16.cpp": ("-march=armv8.2-a+dotprod+bf16",),
}
_AVX512: Final = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni")
# Packing gives the same bytes everywhere: there nothing becomes one operation.
_PACK: Final = ("-ffp-contract=off",)
UNITS: Final[dict[str, dict[str, tuple[str, ...]]]] = {
    "any": {
        "native.cpp": (),
        "peaks.cpp": (),
        "pool.cpp": (),
        "isa_baseline.cpp": (),
        "pack_baseline.cpp": _PACK,
    },
    "x86_64": {
        "isa_avx2.cpp": ("-mavx2", "-mfma"),
        "pack_avx2.cpp": ("-mavx2", *_PACK),
        "pack_avx512.cpp": (*_AVX512, *_PACK),
        "isa_avx512_vnni.cpp": _AVX512,
        "isa_avx512_bf16.cpp": (*_AVX512, "-mavx512bf16"),
    },
    "aarch64": _ARM,
    "arm64": _ARM,
}
"""What is compiled, by machine, with the flags of each file."""


class BuildError(Exception):
    """Why there is no library; the pure torch path serves then."""


def digest() -> str:
    """Of everything that decides what the library does."""
    hashed = hashlib.blake2b(repr((FLAGS, UNITS)).encode(), digest_size=16)
    for path in sorted(SOURCES.iterdir()):
        if path.suffix in (".h", ".cpp"):
            hashed.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return hashed.hexdigest()


def compiler() -> str:
    """The C++ compiler that CXX names, else the first there is."""
    for name in (os.environ.get("CXX", ""), *COMPILERS):
        found = shutil.which(name) if name else None
        if found:
            return found
    raise BuildError(f"no C++ compiler is installed (looked for {', '.join(COMPILERS)})")


def build(target: Path = LIBRARY, *, extra: tuple[str, ...] = ()) -> None:
    """Compile and link; the old library serves until the new one is whole."""
    if sys.platform not in ("linux", "darwin"):
        raise BuildError(f"the native step is not made for {sys.platform}")
    program = compiler()
    units = UNITS["any"] | UNITS.get(platform.machine(), {})
    with tempfile.TemporaryDirectory() as folder:
        objects = {name: str(Path(folder, name).with_suffix(".o")) for name in units}

        def compile_unit(name: str) -> None:
            stamp = (f'-DLLM_DIGEST="{digest()}"',) if name == "native.cpp" else ()
            source = str(SOURCES / name)
            _run(program, *FLAGS, *units[name], *stamp, *extra, "-c", source, "-o", objects[name])

        with ThreadPoolExecutor(
            len(os.sched_getaffinity(0)) if sys.platform == "linux" else 2
        ) as at:
            list(at.map(compile_unit, sorted(units, reverse=True)))
        linked = Path(folder, target.name)
        _run(program, "-shared", "-pthread", *extra, *objects.values(), "-o", str(linked))
        beside = target.with_name(f"{target.name}.{os.getpid()}")
        shutil.copy(linked, beside)
        beside.replace(target)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BuildError(f"{' '.join(command)}: {done.stderr.strip()[-2000:]}")


if __name__ == "__main__":
    try:
        build()
    except BuildError as error:
        sys.exit(str(error))
