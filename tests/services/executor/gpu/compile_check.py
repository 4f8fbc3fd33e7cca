"""Run by test_kernels.py in a process of its own: compiles the kernels for an H100 as a step would
launch them, which needs no GPU.  Prints what a program of each takes."""

import sys
from collections.abc import Callable
from typing import Any

import torch
import triton
from llmservices.executor.gpu.kernels import attention, layers
from llmservices.executor.gpu.kernels.operations import Kernels
from llmservices.executor.gpu.runner import GpuRunner
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tests.services.executor.gpu.decoders import BLOCK_TOKENS, ROOM, STEPS, make

TARGET = GPUTarget("cuda", 90, 32)
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")
TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


class Compiling:
    """Stands for a kernel: compiles what is launched instead of running it, each once."""

    def __init__(self, kernel: Any, done: set[str]) -> None:  # Any: the library is untyped
        self._kernel = kernel
        self._done = done

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return self._launch

    def _launch(self, *values: Any, **named: Any) -> None:
        names = self._kernel.arg_names
        given = dict(zip(names, values)) | named
        options = {name: given.pop(name) for name in OPTIONS if name in given}
        signature, constants = {}, {}
        for parameter in self._kernel.params:
            value = given[parameter.name]
            if parameter.is_constexpr:
                signature[parameter.name] = "constexpr"
                constants[parameter.name] = value
            elif isinstance(value, torch.Tensor):
                signature[parameter.name] = TYPES[value.dtype]
            else:
                signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
        key = f"{self._kernel.__name__} {signature} {constants} {options}"
        if key in self._done:
            return
        self._done.add(key)
        # Torch's memory is aligned, which the launcher tells the compiler.
        aligned = {
            (index,): [["tt.divisibility", 16]]
            for index, kind in enumerate(signature.values())
            if kind.startswith("*")
        }
        source = ASTSource(self._kernel, signature, constexprs=constants, attrs=aligned)
        compiled = triton.compile(source, target=TARGET, options=options)
        shown = {name: value for name, value in constants.items() if value is not None}
        code = compiled.asm["ptx"]
        wide = sum(code.count(name) for name in ("ld.global.v4", "cp.async.cg"))
        print(self._kernel.__name__, shown, "shared:", compiled.metadata.shared, "wide:", wide)
        assert compiled.metadata.shared <= 227 * 1024


def main() -> None:
    """`compile_check.py FAMILY...`."""
    done: set[str] = set()
    for module, name in (
        (attention, "_attend"),
        (attention, "_join"),
        (layers, "_add_norm"),
        (layers, "_store"),
        (layers, "_gate"),
    ):
        vars(module)[name] = Compiling(vars(module)[name], done)
    for family in sys.argv[1:]:
        for dtype in (torch.bfloat16, torch.float32):
            model = make(family, dtype=dtype)
            kernels = Kernels(model)
            kernels._programs = 264  # of an H100
            runner = GpuRunner(
                model,
                blocks=8 * ROOM,
                block_tokens=BLOCK_TOKENS,
                residents_max=8,
                operations=kernels,
            )
            with torch.inference_mode():
                for step in STEPS:
                    runner.compute(step)
    eight_billion()
    print(len(done), "kernels")


def eight_billion() -> None:
    """The attention of Llama-3.1-8B."""
    cache = torch.zeros((9, 2, 8, 16, 128), dtype=torch.bfloat16)
    numbers = torch.zeros(64, dtype=torch.int32)
    for tiles, parts in ((None, 1), (None, 32), (torch.zeros((2, 4), dtype=torch.int32), 1)):
        q = torch.zeros((64, 32, 128), dtype=torch.bfloat16)
        attention.attention(
            q,
            cache,
            q.clone(),
            tables=numbers,
            positions_N=numbers,
            firsts_N=numbers,
            tiles=tiles,
            tile_rows=16,
            parts=parts,
            scale=0.1,
            softcap=None,
            window=None,
        )


if __name__ == "__main__":
    main()
