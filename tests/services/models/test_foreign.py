"""Architectures that are not our own, through the library."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from llmproto.errors import ErrorKind, RemoteError
from llmproto.generation import Sampling
from llmservices.executor.contract import Admission, EngineConfig, StepResult
from llmservices.executor.core import Engine
from llmservices.models.foreign import ForeignModel
from llmservices.models.loading import load
from safetensors.torch import load_file, save_file

PROMPTS = [[5, 17, 3, 88, 41, 2, 60, 33, 9], [7], [4, 8, 15, 16]]
OUTPUT = 10
CONFIGS: dict[str, Any] = {  # Any: the library's configs
    "opt": transformers.OPTConfig(
        vocab_size=97,
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        word_embed_proj_dim=32,
        init_std=0.3,
        eos_token_id=None,
        pad_token_id=1,
    ),
    "bloom": transformers.BloomConfig(
        vocab_size=97, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.3, eos_token_id=None
    ),
    "mamba": transformers.MambaConfig(
        vocab_size=97,
        hidden_size=32,
        state_size=4,
        num_hidden_layers=2,
        initializer_range=0.3,
        eos_token_id=None,
    ),
}


@pytest.fixture(scope="module", params=list(CONFIGS))
def reference(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[list[int]]]:
    """(folder, greedy continuation of each prompt)."""
    torch.manual_seed(3)
    library: Any = transformers.AutoModelForCausalLM  # Any: untyped
    model = library.from_config(CONFIGS[request.param], dtype=torch.float32).eval()
    folder = tmp_path_factory.mktemp(str(request.param))
    model.save_pretrained(folder)
    return folder, [
        model.generate(torch.tensor([prompt]), max_new_tokens=OUTPUT, do_sample=False)[
            0, len(prompt) :
        ].tolist()
        for prompt in PROMPTS
    ]


@pytest.mark.parametrize("exact", [False, True])
def test_tokens_of_the_reference(reference: tuple[Path, list[list[int]]], exact: bool) -> None:
    folder, expected = reference
    model = load(folder, device=torch.device("cpu"))
    assert isinstance(model, ForeignModel)
    engine = Engine(
        model, EngineConfig(kv_bytes=1 << 20, block_tokens=4, step_tokens=6, exact=exact)
    )
    for residency, prompt in enumerate(PROMPTS):
        engine.add(
            Admission(
                thread=bytes(8),
                residency=residency,
                tokens=prompt,
                prompt_tokens=len(prompt),
                output_tokens_max=OUTPUT,
                sampling=Sampling(temperature=0.0),
                prompt_scores=True,
            )
        )
    tokens: list[list[int | None]] = [[] for _ in PROMPTS]
    while engine.runnable():
        result: StepResult = engine.step()
        engine.check()
        for row in result.rows:
            engine.watermark(row.residency, row.position)
            tokens[row.residency].append(row.token)
            if row.prompt_scores is not None:
                assert [score.token for score in row.prompt_scores] == PROMPTS[row.residency]
    assert tokens == expected


def test_what_the_library_does_not_know(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no-such-thing"}))
    with pytest.raises(RemoteError, match="cannot be loaded as a causal") as caught:
        load(tmp_path, device=torch.device("cpu"))
    assert caught.value.kind == ErrorKind.INVALID


def test_a_missing_tensor(reference: tuple[Path, list[list[int]]], tmp_path: Path) -> None:
    tensors = load_file(reference[0] / "model.safetensors")
    del tensors[sorted(tensors)[-1]]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((reference[0] / "config.json").read_text())
    with pytest.raises(RemoteError, match="is missing"):
        load(tmp_path, device=torch.device("cpu"))
