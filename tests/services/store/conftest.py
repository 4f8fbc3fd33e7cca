"""Stores in folders of memory: what they sync costs nothing there."""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from llmservices.store.archive import Archive
from safetensors.torch import save_file

from .saves import CONFIG, Tensors

MEMORY = Path("/dev/shm")


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as name:
        yield Path(name)


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
