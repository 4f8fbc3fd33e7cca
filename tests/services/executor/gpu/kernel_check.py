"""Run by test_kernels.py in a process of its own: Triton decides when it is imported whether it
interprets.  Every step with the kernels against the plain path; prints what failed."""

import sys

import torch
from llmservices.executor.gpu.kernels import attention
from llmservices.executor.gpu.kernels.operations import Kernels
from llmservices.executor.gpu.runner import GpuRunner
from llmservices.executor.runner import PagedRunner, Work

from tests.services.executor.gpu.decoders import (
    BLOCK_TOKENS,
    FAMILIES,
    ROOM,
    SHORT,
    STEPS,
    logits,
    make,
)

BOUNDS = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}


def differences(family: str, dtype: torch.dtype, device: str, steps: list[list[Work]]) -> list[str]:
    """Of every step, where they are more than the bound times the greatest logit."""
    model = make(family, dtype=dtype, device=device)
    blocks = 8 * ROOM
    kernels = GpuRunner(
        model,
        blocks=blocks,
        block_tokens=BLOCK_TOKENS,
        residents_max=8,
        operations=Kernels(model),
    )
    plain = PagedRunner(model, blocks=blocks, block_tokens=BLOCK_TOKENS, exact=False)
    expected = logits(plain, steps)
    failed = []
    with torch.inference_mode():
        for number, (step, wanted) in enumerate(zip(steps, expected, strict=True)):
            found = kernels.compute(step)
            assert found is not None
            difference = float((found.float().cpu() - wanted).abs().max() / wanted.abs().max())
            if not difference <= BOUNDS[dtype]:
                failed.append(f"{family} {dtype} step {number}: {difference}")
    return failed


def parts(device: str) -> list[str]:
    """Attention split among programs, against the same in one piece."""
    generator = torch.Generator().manual_seed(0)
    cache = torch.randn(40, 2, 2, BLOCK_TOKENS, 8, generator=generator).to(device)
    q = torch.randn(3, 6, 8, generator=generator).to(device)
    tables = torch.randperm(39, generator=generator).to(device, torch.int32).repeat(3)
    failed = []
    for window in (None, 70):
        outs = []
        for count in (1, 2, 8):
            out = torch.empty_like(q)
            attention.attention(
                q,
                cache,
                out,
                tables=tables,
                positions_N=torch.tensor([0, 149, 70], dtype=torch.int32, device=device),
                firsts_N=torch.tensor([0, 1, 39], dtype=torch.int32, device=device),
                tiles=None,
                tile_rows=1,
                parts=count,
                scale=0.3,
                softcap=None,
                window=window,
            )
            outs.append(out)
        failed += [
            f"parts {count}, window {window}"
            for count, out in zip((2, 8), outs[1:], strict=True)
            if not torch.allclose(out, outs[0], atol=1e-5)
        ]
    return failed


def main() -> None:
    """`kernel_check.py DEVICE short|all FAMILY...`; all families where none is named."""
    device, length, *families = sys.argv[1:]
    failed = parts(device)
    for family in families or FAMILIES:
        for dtype in BOUNDS:
            # The interpreter multiplies bfloat16 as if its bits were integers.
            if device == "cpu" and dtype == torch.bfloat16:
                continue
            if length == "all":
                failed += differences(family, dtype, device, STEPS)
            elif dtype == torch.float32:
                failed += differences(family, dtype, device, SHORT)
    print("\n".join(failed))
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
