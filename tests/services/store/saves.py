"""Saves as a trainer sends them, and what must hold of a store."""

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from llmproto.versions import Lineage, Save, Saved, TensorGroup, TensorPlace, VersionKind
from llmservices.store.archive import Archive
from llmservices.store.verifying import Verifier
from llmservices.versions.manifest import folder_of, read_manifest

ALIGNMENT = 64
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.int64: "I64"}
CONFIG = b'{"architectures": ["LlamaForCausalLM"], "model_type": "llama"}'
PIECE_FLOATS = (4 << 20) // 4

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
    lineage: Lineage | None = None,
) -> Save:
    """A request with one small file, config.json."""
    return Save(
        name=name,
        kind=kind,
        buffer=str(buffer),
        groups=pack(buffer, groups),
        files=["config.json"],
        lineage=lineage or Lineage(),
    )


def random_tensors(seed: int, *sizes: int) -> dict[str, torch.Tensor]:
    """One of each size, named by number."""
    generator = torch.Generator().manual_seed(seed)
    return {f"t{n}": torch.randn(size, generator=generator) for n, size in enumerate(sizes)}


def small_save(archive: Archive, buffer: Path, seed: int) -> Saved:
    """A version of three tensors, one of them in two pieces."""
    tensors = random_tensors(seed, 5, 300, PIECE_FLOATS + 100)
    return archive.save(save_of(buffer, {"model.safetensors": tensors}), [CONFIG])


def checkpoint(archive: Archive, buffer: Path, step: int, *, job: bytes = b"12345678") -> Saved:
    """A small one of a job."""
    lineage = Lineage(job=job, step=step)
    groups = {"optimizer.safetensors": random_tensors(step, 10)}
    save = save_of(buffer, groups, kind=VersionKind.CHECKPOINT, lineage=lineage)
    return archive.save(save, [CONFIG])


def objects_on_disk(root: Path) -> set[str]:
    return {path.name for path in (root / "objects").glob("*/*")}


def check_store(archive: Archive, *, collected: bool = True) -> None:
    """Every visible version verifies; nothing else is there (after a collection)."""
    entries = archive.index.all()
    verified = Verifier(archive.root).verify(entries, archive.damaged)
    assert verified.damage == [], verified.damage
    assert list((archive.root / "tmp").iterdir()) == []
    wanted: set[str] = set()
    for entry in entries:
        folder = folder_of(archive.root, bytes.fromhex(entry.digest))
        wanted |= set(read_manifest(folder)[0].objects())
    folders = {path.name for path in (archive.root / "versions").iterdir()}
    assert folders == {entry.digest[:32] for entry in entries}
    there = objects_on_disk(archive.root)
    assert (there == wanted) if collected else (there >= wanted)


def bytes_used(root: Path) -> int:
    """Of all files in a folder, files with several names once."""
    sizes = {}
    for folder, _, names in os.walk(root):
        for name in names:
            stat = (Path(folder) / name).stat()
            sizes[stat.st_ino] = stat.st_size
    return sum(sizes.values())
