"""Every family of our own, token for token in float32 against the reference implementation."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import transformers
from llmproto.generation import Sampling
from llmservices.executor.contract import Admission, EngineConfig
from llmservices.executor.core import Engine
from llmservices.executor.runner import PagedRunner, Work
from llmservices.models.decoder import Decoder
from llmservices.models.loading import load

VOCAB, PROMPT, OUTPUT = 97, [5, 17, 3, 88, 41, 2, 60, 33, 9], 24
TEXT = [(13 * i * i + 5) % VOCAB for i in range(60)]
SMALL: dict[str, Any] = {  # Any: keyword arguments of the library's configs
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": None,
    "pad_token_id": None,
    "initializer_range": 0.2,
}
GEMMA = {**SMALL, "head_dim": 24, "sliding_window": 8, "query_pre_attn_scalar": 20}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
LINEAR = {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.0}


class Reference(NamedTuple):
    """What the library makes of a folder."""

    folder: Path
    tokens: list[int]
    """Greedy continuation of PROMPT."""
    logits: torch.Tensor
    """Of TEXT."""


def configs() -> dict[str, Any]:
    """The library's configs by a name for the test."""
    t = transformers
    return {
        "llama": t.LlamaConfig(**SMALL),
        "llama-tied-biased": t.LlamaConfig(
            **SMALL, tie_word_embeddings=True, attention_bias=True, mlp_bias=True, head_dim=12
        ),
        "llama-linear": t.LlamaConfig(**SMALL, rope_parameters=LINEAR),
        "llama-llama3": t.LlamaConfig(**SMALL, rope_parameters=LLAMA3),
        "llama-yarn": t.LlamaConfig(**SMALL, rope_parameters=YARN),
        "mistral": t.MistralConfig(**SMALL, sliding_window=7),
        "qwen2": t.Qwen2Config(**SMALL, tie_word_embeddings=True),
        "qwen2-window": t.Qwen2Config(
            **SMALL, use_sliding_window=True, sliding_window=6, max_window_layers=2
        ),
        "qwen3": t.Qwen3Config(**SMALL, head_dim=24),
        "gemma2": t.Gemma2Config(**GEMMA, final_logit_softcapping=20.0),
        "gemma3": t.Gemma3TextConfig(
            **GEMMA, layer_types=["sliding_attention", "full_attention"] * 2
        ),
        "gpt2": t.GPT2Config(
            vocab_size=VOCAB,
            n_embd=64,
            n_layer=3,
            n_head=4,
            n_positions=64,
            initializer_range=0.2,
            bos_token_id=0,
            eos_token_id=None,
        ),
        "gpt_neox": t.GPTNeoXConfig(
            **{k: v for k, v in SMALL.items() if k != "num_key_value_heads"}
        ),
        "gpt_neox-serial": t.GPTNeoXConfig(
            **{k: v for k, v in SMALL.items() if k != "num_key_value_heads"},
            use_parallel_residual=False,
            attention_bias=False,
            hidden_act="relu",
        ),
    }


CONFIGS = configs()
OLD_LAYOUT = {"llama", "llama-linear", "llama-llama3", "llama-yarn", "gemma3", "gpt_neox"}
CASES = [
    (name, old) for name in CONFIGS for old in ([False, True] if name in OLD_LAYOUT else [False])
]


def old_layout(config: dict[str, Any]) -> dict[str, Any]:
    """The same config as version 4 of the library wrote it."""
    rope = config.pop("rope_parameters")
    config["torch_dtype"] = config.pop("dtype")
    if config["model_type"] == "gemma3_text":
        return config | {
            "rope_theta": rope["full_attention"]["rope_theta"],
            "rope_local_base_freq": rope["sliding_attention"]["rope_theta"],
        }
    if config["model_type"] == "gpt_neox":
        return config | {
            "rotary_emb_base": rope["rope_theta"],
            "rotary_pct": rope["partial_rotary_factor"],
        }
    base = rope.pop("rope_theta")
    scaling = None if rope["rope_type"] == "default" else rope
    return config | {"rope_theta": base, "rope_scaling": scaling}


@pytest.fixture(scope="session")
def references(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Reference]:
    """A tiny random model of each kind, and what the library makes of it."""
    made = {}
    for name, config in CONFIGS.items():
        torch.manual_seed(11)
        library: Any = transformers.AutoModelForCausalLM  # Any: untyped
        model = library.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
        with torch.no_grad():
            for parameter in model.parameters():
                # Norms and biases that are not all one, or zero, are told apart.
                if parameter.dim() == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.2)
        folder = tmp_path_factory.mktemp(name)
        model.save_pretrained(folder)
        ids = model.generate(torch.tensor([PROMPT]), max_new_tokens=OUTPUT, do_sample=False)
        with torch.inference_mode():
            logits = model(torch.tensor([TEXT])).logits[0]
        made[name] = Reference(folder, ids[0, len(PROMPT) :].tolist(), logits)
    return made


@pytest.mark.parametrize(("name", "old"), CASES)
def test_tokens_and_logits_of_the_reference(
    references: dict[str, Reference], tmp_path: Path, name: str, old: bool
) -> None:
    reference = references[name]
    folder = reference.folder
    if old:
        config = json.loads((folder / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(old_layout(config)))
        (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
        folder = tmp_path
    model = load(folder, device=torch.device("cpu"))
    assert isinstance(model, Decoder)
    difference = 1e-4 * float(reference.logits.abs().max())
    for exact in (False, True):
        runner = PagedRunner(model, blocks=16, block_tokens=4, exact=exact)
        with torch.inference_mode():
            ours = runner.compute([Work(1, np.asarray(TEXT), 0, range(16), "all")])
        torch.testing.assert_close(ours, reference.logits, rtol=1e-4, atol=difference)
        for rows in (64, 4):
            engine = Engine(
                model, EngineConfig(blocks=32, block_tokens=4, step_tokens=rows, exact=exact)
            )
            assert generate(engine) == reference.tokens


def generate(engine: Engine) -> list[int | None]:
    """Greedy continuation, beside two other threads."""
    for residency in (1, 2, 3):
        engine.add(
            Admission(
                thread=bytes(8),
                residency=residency,
                tokens=PROMPT if residency == 2 else PROMPT[:residency],
                prompt_tokens=len(PROMPT) if residency == 2 else residency,
                output_tokens_max=OUTPUT,
                sampling=Sampling(temperature=0.0),
            )
        )
    tokens = []
    while engine.runnable():
        for row in engine.step().rows:
            engine.watermark(row.residency, row.position)
            if row.residency == 2:
                tokens.append(row.token)
    return tokens
