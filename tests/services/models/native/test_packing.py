"""Packed weights are, byte for byte, the layouts that `reference.py` spells out."""

import mmap
from pathlib import Path

import pytest
import torch
from llmservices.models.native.bindings import Functions
from llmservices.models.native.packing import Packed, Packer

from tests.services.executor.native_models import functions_or_skip
from tests.services.models.native import reference
from tests.services.models.native.memory import resident_pages

DTYPES = [torch.float32, torch.bfloat16]
PRECISIONS = ["auto", "int8", "int4"]


@pytest.fixture(scope="module")
def functions() -> Functions:
    return functions_or_skip()


def drawn(rows: int, depth: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, depth, generator=generator) * 0.02).to(dtype)


def assert_packed(found: Packed, weight: torch.Tensor, precision: str) -> None:
    """`weight` is padded, its columns in order."""
    data, scales = reference.packed(weight, precision)
    assert (found.columns, found.depth) == weight.shape
    assert torch.equal(found.data, data)
    assert (found.scales is None) == (scales is None)
    if scales is not None and found.scales is not None:
        assert torch.equal(found.scales, scales)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (33, 31), (64, 64), (100, 97), (16, 130), (200, 256)])
def test_any_size_on_any_processor_and_threads(
    functions: Functions, shape: tuple[int, int], dtype: torch.dtype, precision: str
) -> None:
    weight = drawn(*shape, dtype)
    for isa in functions.llm_isas().decode().split():
        for threads in (1, 3):
            found = Packer(functions, threads, isa=isa).pack([weight], None, precision)
            assert_packed(found, reference.padded(weight), precision)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_parts_stand_one_after_another(
    functions: Functions, dtype: torch.dtype, precision: str
) -> None:
    parts = [drawn(rows, 70, dtype, seed=rows) for rows in (40, 7, 21)]
    found = Packer(functions, 2).pack(parts, None, precision)
    assert_packed(found, reference.padded(torch.cat(parts)), precision)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gate_and_up_stand_in_turns(
    functions: Functions, dtype: torch.dtype, precision: str
) -> None:
    gate, up = drawn(43, 50, dtype, 1), drawn(43, 50, dtype, 2)
    bias = torch.arange(86.0).to(dtype)
    found = Packer(functions, 2).pack([gate, up], bias, precision, in_turns=True)
    depth_padded = reference.padded(reference.interleaved(gate, up))
    assert_packed(found, depth_padded, precision)
    assert found.bias is not None
    assert torch.equal(found.bias, reference.interleaved(*bias.float().chunk(2)))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_ties_zeros_and_extremes(functions: Functions, precision: str) -> None:
    """Numbers halfway between two, groups of zeros (both signs), one far out, several of one size,
    scales that half precision has no normal number for, or none at all."""
    weight = drawn(64, 96, torch.float32)
    weight[0], weight[1] = 0.0, -0.0
    weight[2, ::32] = 3.0
    weight[3] = torch.arange(96) % 2 - 0.5
    weight[4] = (torch.arange(96) % 32 - 16) / 2
    weight[5] = (torch.arange(96) - 48) * 0.5
    weight[5, 0] = 127.0
    weight[6] *= 1e-5
    weight[7] *= 1e-8
    weight[8] *= 1e-38
    weight[9] *= 1e6
    weight[10] *= 1e9
    for isa in functions.llm_isas().decode().split():
        found = Packer(functions, 1, isa=isa).pack([weight], None, precision)
        assert_packed(found, weight, precision)


def test_what_was_read_of_a_file_is_given_back(functions: Functions, tmp_path: Path) -> None:
    """And only that: the numbers before and behind it in the same pages are still there."""
    whole = drawn(600, 512, torch.bfloat16)
    path = tmp_path / "weights"
    path.write_bytes(whole.view(torch.uint8).numpy().tobytes())
    with path.open("rb") as file:
        held = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    tensor = torch.frombuffer(held, dtype=torch.bfloat16).view(600, 512)
    tensor[0] = 1.0
    tensor[-1] = 2.0
    part = tensor[1:-1]
    assert torch.equal(part, whole[1:-1])  # reads all of it
    assert resident_pages(part) > 100
    found = Packer(functions, 1, forgets=True).pack([part], None, "auto")
    assert resident_pages(part) <= 2
    assert_packed(found, reference.padded(whole[1:-1]), "auto")
    assert (tensor[0] == 1.0).all()
    assert (tensor[-1] == 2.0).all()
