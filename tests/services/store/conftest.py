"""Stores in temporary folders, and saves as a trainer sends them."""

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from llmproto.versions import Lineage, Save, Saved, TensorGroup, TensorPlace, VersionKind
from llmservices.store.archive import Archive
from safetensors.torch import save_file

ALIGNMENT = 64
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.int64: "I64"}
CONFIG = b'{"architectures": ["LlamaForCausalLM"], "model_type": "llama"}'

Tensors = Mapping[str, torch.Tensor]


def pack(buffer: Path, groups: Mapping[str, Tensors]) -> list[TensorGroup]:
    """Write the tensors to a buffer; what stands where."""
    content = bytearray()
    found = []
    for file, tensors in groups.items():
        places = []
        for name, tensor in tensors.items():
            content += bytes(-len(content) % ALIGNMENT)
            raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            dtype = DTYPES[tensor.dtype]
            places.append(TensorPlace(name, dtype, list(tensor.shape), len(content), len(raw)))
            content += raw
        found.append(TensorGroup(file, places))
    buffer.write_bytes(content)
    return found


def save_of(
    buffer: Path,
    groups: Mapping[str, Tensors],
    *,
    name: str = "model",
    kind: VersionKind = VersionKind.MODEL,
    inherit: bytes | None = None,
    lineage: Lineage | None = None,
) -> Save:
    """A whole request, for the small files (config.json, state.json)."""
    return Save(
        name=name,
        kind=kind,
        buffer=str(buffer),
        groups=pack(buffer, groups),
        files=["config.json"],
        inherit=inherit,
        lineage=lineage or Lineage(),
    )


def random_tensors(seed: int, *sizes: int) -> dict[str, torch.Tensor]:
    """One of each size, named by number."""
    generator = torch.Generator().manual_seed(seed)
    return {f"t{n}": torch.randn(size, generator=generator) for n, size in enumerate(sizes)}


def small_save(archive: Archive, buffer: Path, seed: int, **more: object) -> Saved:
    """A version of three tensors, one of them in two pieces."""
    tensors = random_tensors(seed, 5, 300, (4 << 20) // 4 + 100)
    save = save_of(buffer, {"model.safetensors": tensors})
    return archive.save(save, [CONFIG])


@pytest.fixture
def archive(tmp_path: Path) -> Archive:
    return Archive(tmp_path / "store", threads=2)


@pytest.fixture
def plain_folder(tmp_path: Path) -> Callable[[str, Tensors], Path]:
    """Makes plain folders."""

    def make(name: str, tensors: Tensors) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_bytes(CONFIG)
        (folder / "tokenizer.json").write_bytes(b"{}")
        save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return make
