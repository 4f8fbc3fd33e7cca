"""A tiny random Llama folder, and engines over it."""

import json
from pathlib import Path

import pytest
import torch
from llmservices.models.decoder import Decoder
from llmservices.models.loading import load
from llmservices.models.native.bindings import Functions
from safetensors.torch import save_file

from tests.services.executor.native_models import functions_or_skip

HIDDEN, INNER, LAYERS, HEADS, KV_HEADS, HEAD_DIM, VOCAB, CONTEXT = 48, 76, 2, 6, 2, 8, 101, 160


@pytest.fixture(scope="session")
def functions() -> Functions:
    """The native library."""
    return functions_or_skip()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights large enough that logits differ clearly; widths that are no multiple of a vector."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    generator = torch.Generator().manual_seed(5)

    def weight(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * float(1.5 * shape[-1] ** -0.5)

    tensors = {
        "model.embed_tokens.weight": weight(VOCAB, HIDDEN) * 3,
        "lm_head.weight": weight(VOCAB, HIDDEN) * 2,
        "model.norm.weight": torch.ones(HIDDEN),
    }
    for layer in range(LAYERS):
        at = f"model.layers.{layer}."
        tensors |= {
            at + "input_layernorm.weight": torch.ones(HIDDEN),
            at + "post_attention_layernorm.weight": torch.ones(HIDDEN),
            at + "self_attn.q_proj.weight": weight(HEADS * HEAD_DIM, HIDDEN),
            at + "self_attn.k_proj.weight": weight(KV_HEADS * HEAD_DIM, HIDDEN),
            at + "self_attn.v_proj.weight": weight(KV_HEADS * HEAD_DIM, HIDDEN),
            at + "self_attn.o_proj.weight": weight(HIDDEN, HEADS * HEAD_DIM),
            at + "mlp.gate_proj.weight": weight(INNER, HIDDEN),
            at + "mlp.up_proj.weight": weight(INNER, HIDDEN),
            at + "mlp.down_proj.weight": weight(HIDDEN, INNER),
        }
    save_file(tensors, folder / "model.safetensors")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "vocab_size": VOCAB,
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def tiny(tiny_folder: Path) -> Decoder:
    """In float32."""
    return _decoder(tiny_folder)


@pytest.fixture
def poisoned(tiny_folder: Path) -> Decoder:
    """Token 99 makes everything that sees it a NaN."""
    model = _decoder(tiny_folder)
    with torch.inference_mode():
        model.embedding_VC[99] = float("nan")
    return model


@pytest.fixture(scope="session")
def tiny_bfloat16(tiny_folder: Path) -> Decoder:
    model = load(tiny_folder, dtype="bfloat16", device=torch.device("cpu"))
    assert isinstance(model, Decoder)
    return model


def _decoder(folder: Path) -> Decoder:
    model = load(folder, device=torch.device("cpu"))
    assert isinstance(model, Decoder)
    return model
