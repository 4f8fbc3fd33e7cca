"""The buffer that a checkpoint is copied into."""

from pathlib import Path

import msgspec
import pytest
import torch
from llmproto.versions import TensorGroup
from llmservices.trainer import savebuffer
from llmservices.trainer.savebuffer import ALIGNMENT, SaveBuffer, bytes_of

GROUPS = {
    "model.safetensors": {
        "a": torch.arange(6, dtype=torch.float32).reshape(2, 3),
        "b": torch.ones(5, dtype=torch.bfloat16),
        "none": torch.empty(0, 3),
    },
    "optimizer.safetensors": {"step": torch.tensor(3.0), "rng": torch.arange(9, dtype=torch.uint8)},
}


def test_what_is_written_is_where_it_is_said_to_be(tmp_path: Path) -> None:
    buffer = SaveBuffer(tmp_path / "buffer", bytes_of(GROUPS))
    written = buffer.write(GROUPS)
    content = (tmp_path / "buffer").read_bytes()
    assert written.layout is None and [group.file for group in written.groups] == list(GROUPS)
    for group in written.groups:
        for place in group.tensors:
            tensor = GROUPS[group.file][place.name]
            assert place.offset % ALIGNMENT == 0 and place.shape == list(tensor.shape)
            raw = tensor.reshape(-1).view(torch.uint8) if tensor.numel() else tensor
            assert content[place.offset : place.offset + place.bytes] == bytes(
                raw.flatten().tolist()
            )
    empty = {
        file: {name: torch.zeros_like(t) for name, t in g.items()} for file, g in GROUPS.items()
    }
    buffer.read(empty)
    assert all(torch.equal(empty[f][n], GROUPS[f][n]) for f in GROUPS for n in GROUPS[f])
    buffer.close()
    assert not (tmp_path / "buffer").exists()


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_share_the_copy_and_matrices_are_turned_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(savebuffer, "PIECE_BYTES", 100)
    drawn = torch.arange(6000, dtype=torch.float32)
    tensors = {
        "turned": drawn.reshape(60, 100).t(),
        "half": drawn.reshape(100, 60).bfloat16().t(),
        "strided": drawn.reshape(2, 3000)[:, ::2],
        "whole": drawn,
        "number": torch.tensor(7),
        "column": torch.ones(1, 5, dtype=torch.float64)[:, 0],
        "switches": drawn > 100,
    }
    groups = {"model.safetensors": tensors}
    buffer = SaveBuffer(tmp_path / "buffer", bytes_of(groups))
    for _ in range(2):
        (group,) = buffer.write(groups).groups
        buffer.settle()
        found = {name: torch.zeros(each.shape, dtype=each.dtype) for name, each in tensors.items()}
        buffer.read({"model.safetensors": found})
        assert all(torch.equal(found[name], each) for name, each in tensors.items())
    assert [place.shape for place in group.tensors[:3]] == [[100, 60], [60, 100], [2, 1500]]
    buffer.close()


def test_a_long_layout_goes_through_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short = SaveBuffer(tmp_path / "short", bytes_of(GROUPS)).write(GROUPS)
    monkeypatch.setattr(savebuffer, "LAYOUT_BYTES_MAX", 10)
    written = SaveBuffer(tmp_path / "buffer", bytes_of(GROUPS)).write(GROUPS)
    assert written.groups == [] and written.layout is not None
    found = msgspec.msgpack.decode(Path(written.layout).read_bytes(), type=list[TensorGroup])
    assert found == short.groups


def test_files_that_no_message_holds_stand_beside_it(tmp_path: Path) -> None:
    buffer = SaveBuffer(tmp_path / "buffer", 1)
    large = b"x" * (savebuffer.FILES_BYTES_MAX + 1)
    files = {"a": b"a", "tokenizer.json": large, "b": large[2:], "c": b"cc"}
    small, paths = buffer.beside(files)
    assert list(small) == ["a", "b"] and list(paths) == ["tokenizer.json", "c"]
    assert Path(paths["tokenizer.json"]).read_bytes() == large
    buffer.beside({"tokenizer.json": b"y" + large})
    assert Path(paths["tokenizer.json"]).read_bytes() == b"y" + large
    buffer.close()
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_swept_away(tmp_path: Path) -> None:
    living = SaveBuffer(tmp_path / f"{savebuffer.PREFIX}living", 1)
    (tmp_path / f"{savebuffer.PREFIX}killed").write_bytes(b"1")
    (tmp_path / f"{savebuffer.PREFIX}killed.layout").write_bytes(b"1")
    (tmp_path / "another").write_bytes(b"1")
    savebuffer.sweep(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {living.path.name, "another"}
    living.close()
