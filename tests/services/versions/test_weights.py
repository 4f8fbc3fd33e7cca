"""Adapters as versions: merged as peft merges them, exported as transformers and peft load them."""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from llmproto.errors import RemoteError
from llmservices.models.folder import Tensors
from llmservices.store.archive import Archive
from llmservices.store.exporting import export
from llmservices.versions.manifest import folder_of
from llmservices.versions.weights import read_tensors
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

# peft calls what transformers has renamed, and tells that it saves embeddings.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
]

MEMORY = Path("/dev/shm")
LLAMA = LlamaConfig(
    vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=False,
)  # fmt: skip
GPT2 = GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=32)
BERT = BertConfig(
    vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
    num_attention_heads=2, max_position_embeddings=32,
)  # fmt: skip


@pytest.fixture
def place() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as name:
        yield Path(name)


def adapted(model: Any, **options: Any) -> Any:  # Any: peft and transformers have no types
    """With a random adapter."""
    wrapped = get_peft_model(model, LoraConfig(lora_alpha=6, **options))
    generator = torch.Generator().manual_seed(3)
    for name, parameter in wrapped.named_parameters():
        if parameter.requires_grad:
            assert name
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    return wrapped.eval()


def imported(place: Path, base: Path, adapter: Path) -> tuple[Archive, Path]:
    """A store with both; the adapter's version."""
    archive = Archive(place / "store")
    archive.import_folder(base, "base", None)
    saved = archive.import_folder(adapter, "tuned", "base")
    return archive, folder_of(archive.root, saved.version)


CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "plain": (LLAMA, {"r": 4, "target_modules": ["q_proj", "down_proj"]}),
    "rank-stabilised": (LLAMA, {"r": 4, "use_rslora": True, "target_modules": ["q_proj"]}),
    "patterns": (
        LLAMA,
        {
            "r": 4,
            "target_modules": ["q_proj", "v_proj"],
            "rank_pattern": {"v_proj": 2},
            "alpha_pattern": {"layers.1.self_attn.q_proj": 9},
        },
    ),
    "saved whole": (
        LLAMA, {"r": 2, "target_modules": ["o_proj"], "modules_to_save": ["lm_head", "norm"]},
    ),
    "embedding": (LLAMA, {"r": 2, "target_modules": ["embed_tokens"]}),
    "transposed": (GPT2, {"r": 2, "target_modules": ["c_attn"], "fan_in_fan_out": True}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_an_adapter_is_merged_as_peft_merges_it(place: Path, case: str) -> None:
    config, options = CASES[case]
    torch.manual_seed(1)
    model = LlamaForCausalLM(config) if config is LLAMA else GPT2LMHeadModel(config)
    model.save_pretrained(place / "base")
    wrapped = adapted(model, task_type="CAUSAL_LM", **options)
    wrapped.save_pretrained(place / "adapter")
    _, folder = imported(place, place / "base", place / "adapter")
    wrapped.merge_and_unload().save_pretrained(place / "merged")
    wanted = load_file(place / "merged" / "model.safetensors")
    found = read_tensors(folder)
    assert found.keys() == wanted.keys()
    stored = load_file(place / "base" / "model.safetensors")
    assert any(not torch.equal(found[name], tensor) for name, tensor in stored.items())
    for name, tensor in wanted.items():
        assert torch.allclose(found[name], tensor, rtol=0, atol=1e-6), name
    with Tensors(folder, dtype=torch.bfloat16, device=torch.device("cpu")) as tensors:
        for name, tensor in found.items():
            taken = tensors.take(name, *tensor.shape)
            assert torch.equal(taken, tensor.bfloat16())


def test_a_merged_export_is_a_model_and_an_unmerged_one_an_adapter(place: Path) -> None:
    torch.manual_seed(2)
    model = LlamaForCausalLM(LLAMA)
    model.save_pretrained(place / "base")
    wrapped = adapted(model, task_type="CAUSAL_LM", r=4, target_modules=["q_proj"])
    wrapped.save_pretrained(place / "adapter")
    _, folder = imported(place, place / "base", place / "adapter")
    export(folder, place / "whole", merge=True)
    export(folder, place / "peft", merge=False)
    whole = load_file(place / "whole" / "model.safetensors")
    assert all(torch.equal(whole[name], tensor) for name, tensor in read_tensors(folder).items())
    assert not (place / "whole" / "adapter_config.json").exists()
    tokens = torch.arange(8)[None]
    with torch.inference_mode():
        wanted = wrapped(tokens).logits
        loaded: Any = AutoModelForCausalLM.from_pretrained(place / "whole")
        loaded.eval()
        assert torch.allclose(loaded(tokens).logits, wanted, atol=1e-5)
        base = AutoModelForCausalLM.from_pretrained(place / "base")
        again = PeftModel.from_pretrained(base, place / "peft").eval()
        assert torch.equal(again(tokens).logits, wanted)


def test_a_classifiers_adapter_brings_its_head(place: Path) -> None:
    """The base is an encoder without one, and its names lack the prefix `bert.`."""
    torch.manual_seed(3)
    BertModel(BERT).save_pretrained(place / "base")
    model = BertForSequenceClassification.from_pretrained(place / "base")
    wrapped = adapted(model, task_type="SEQ_CLS", r=2, target_modules=["query"])
    wrapped.save_pretrained(place / "adapter")
    _, folder = imported(place, place / "base", place / "adapter")
    found = read_tensors(folder)
    merged = wrapped.merge_and_unload().state_dict()
    assert {"classifier.weight", "classifier.bias"} <= found.keys()
    for name, tensor in found.items():
        wanted = merged.get(name, merged.get(f"bert.{name}"))
        assert torch.allclose(tensor, wanted, rtol=0, atol=1e-6), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "use_dora is not implemented"),
        ({"peft_type": "IA3"}, "peft_type 'IA3' is not implemented"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"target_parameters": ["x"]}, "target_parameters"),
        ({"lora_bias": True}, "lora_bias"),
    ],
)
def test_what_cannot_be_merged_is_refused_by_name(
    place: Path, change: dict[str, Any], message: str
) -> None:
    base, adapter = place / "base", place / "adapter"
    for folder, name in ((base, "model"), (adapter, "adapter_model")):
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        save_file({"a.weight": torch.zeros(2, 2)}, folder / f"{name}.safetensors")
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, **change}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(RemoteError, match=message):
        imported(place, base, adapter)
    assert len(Archive(place / "store").index.all()) == 1


def test_an_adapter_of_another_base_is_refused(place: Path) -> None:
    base, adapter = place / "base", place / "adapter"
    for folder, name, tensor in (
        (base, "model", "a.weight"),
        (adapter, "adapter_model", "base_model.model.b.lora_A.weight"),
    ):
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        save_file({tensor: torch.zeros(2, 2)}, folder / f"{name}.safetensors")
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(RemoteError, match=r"changes b\.weight, which its base has not"):
        imported(place, base, adapter)
    archive = Archive(place / "store")
    with pytest.raises(RemoteError, match="import its base first"):
        archive.import_folder(adapter, "tuned", None)
