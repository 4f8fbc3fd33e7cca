"""Every way in which a folder can be wrong is INVALID and names what is wrong."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from llmproto.errors import ErrorKind, RemoteError
from llmservices.models.decoder import Decoder
from llmservices.models.loading import DtypeChoice, load
from safetensors.torch import load_file, save_file

CONFIG: dict[str, Any] = {  # Any: JSON
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 11,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "dtype": "float32",
}
SHAPES = {
    "model.embed_tokens.weight": (11, 16),
    "model.norm.weight": (16,),
    "model.layers.0.input_layernorm.weight": (16,),
    "model.layers.0.post_attention_layernorm.weight": (16,),
    "model.layers.0.self_attn.q_proj.weight": (16, 16),
    "model.layers.0.self_attn.k_proj.weight": (8, 16),
    "model.layers.0.self_attn.v_proj.weight": (8, 16),
    "model.layers.0.self_attn.o_proj.weight": (16, 16),
    "model.layers.0.mlp.gate_proj.weight": (24, 16),
    "model.layers.0.mlp.up_proj.weight": (24, 16),
    "model.layers.0.mlp.down_proj.weight": (16, 24),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(*shape, generator=generator) for name, shape in SHAPES.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


def loaded(folder: Path, dtype: DtypeChoice = "auto") -> Decoder:
    model = load(folder, dtype=dtype, device=torch.device("cpu"))
    assert isinstance(model, Decoder)
    return model


def refusal(folder: Path) -> str:
    with pytest.raises(RemoteError) as caught:
        loaded(folder)
    assert caught.value.kind == ErrorKind.INVALID
    return caught.value.detail


def edit(folder: Path, **changes: Any) -> None:
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))


def retensor(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def shard(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for index, name in enumerate(tensors):
        file = f"model-{index % 2 + 1}-of-2.safetensors"
        weight_map[name] = file
    for file in set(weight_map.values()):
        save_file({n: t for n, t in tensors.items() if weight_map[n] == file}, folder / file)
    index_file = folder / "model.safetensors.index.json"
    index_file.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_precision_is_the_configs_unless_it_is_chosen(folder: Path) -> None:
    assert loaded(folder).dtype == torch.float32
    assert loaded(folder, "bfloat16").dtype == torch.bfloat16
    retensor(folder, lambda tensors: tensors.update({k: v.half() for k, v in tensors.items()}))
    assert loaded(folder).dtype == torch.float32
    edit(folder, dtype=None, torch_dtype="bfloat16")
    assert loaded(folder).dtype == torch.bfloat16
    assert loaded(folder).family == "llama"
    assert loaded(folder).context_tokens == 32
    assert loaded(folder).vocab_tokens == 11
    assert loaded(folder).weight_bytes > 2 * 2 * 11 * 16


def test_shards(folder: Path) -> None:
    whole = loaded(folder).embedding_VC
    shard(folder)
    assert torch.equal(loaded(folder).embedding_VC, whole)
    (folder / "model-2-of-2.safetensors").unlink()
    assert f"{folder}/model-2-of-2.safetensors is missing" in refusal(folder)


def test_a_shard_outside_the_folder(folder: Path) -> None:
    shard(folder)
    weight_map = {"model.norm.weight": "../other.safetensors"}
    index_file = folder / "model.safetensors.index.json"
    index_file.write_text(json.dumps({"weight_map": weight_map}))
    assert "not a file of this folder" in refusal(folder)


def test_not_a_model_folder(tmp_path: Path) -> None:
    assert refusal(tmp_path) == f"{tmp_path} is not a model folder: it has no config.json"
    assert "is not a model folder" in refusal(tmp_path / "absent")
    (tmp_path / "config.json").write_text("{")
    assert "config.json is not a JSON object" in refusal(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    assert "config.json is not a JSON object" in refusal(tmp_path)


def test_weights_missing_torn_or_pickled(folder: Path) -> None:
    weights = folder / "model.safetensors"
    data = weights.read_bytes()
    for torn in (data[: len(data) // 2], data[:5], b"", b"\xff" * 64):
        weights.write_bytes(torn)
        assert f"{weights} is torn" in refusal(folder)
    weights.unlink()
    assert f"{weights} is missing" in refusal(folder)
    (folder / "pytorch_model.bin").write_bytes(b"x")
    assert "pytorch_model.bin is a pickle, which is never read" in refusal(folder)


def test_tensors_missing_or_of_another_shape(folder: Path) -> None:
    copy = folder / "copy"
    copy.mkdir()
    for file in ("config.json", "model.safetensors"):
        shutil.copy(folder / file, copy / file)
    retensor(copy, lambda tensors: tensors.pop("model.norm.weight"))
    assert "tensor model.norm.weight is missing" in refusal(copy)
    edit(folder, vocab_size=12)
    assert "has shape (11, 16); config says (12, 16)" in refusal(folder)
    edit(folder)
    retensor(folder, lambda t: t.update({"model.norm.weight": torch.ones(16, dtype=torch.int8)}))
    assert "is torch.int8" in refusal(folder)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"quantization_config": {"quant_method": "gptq"}}, "quantisation 'gptq'"),
        ({"auto_map": {"AutoModelForCausalLM": "code.Model"}}, "never run"),
        ({"hidden_size": "16"}, "hidden_size is '16'; want an integer"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_act": "mish"}, "'mish' is not implemented"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "rope scaling 'longrope'"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4}}, "'dynamic'"),
        ({"dtype": "float8_e4m3fn"}, "dtype 'float8_e4m3fn'"),
        ({"tie_word_embeddings": "yes"}, "want true or false"),
    ],
)
def test_configs_that_are_refused(folder: Path, changes: dict[str, Any], words: str) -> None:
    edit(folder, **changes)
    detail = refusal(folder)
    assert words in detail
    assert str(folder / "config.json") in detail
