"""What narrow weights cost on real text that no model here has learnt from."""

import json
import math
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch
from llmservices.executor.native import NativeRunner
from llmservices.executor.runner import PagedRunner, Work
from llmservices.models import embedded_corpus
from llmservices.models.decoder import Decoder
from llmservices.models.loading import load
from llmservices.models.native.bindings import Functions
from llmservices.models.native.decoder import NativeDecoder
from llmservices.models.native.packing import Packer
from safetensors.torch import load_file
from tokenizers import Tokenizer

from tests.services.executor.native_models import int4_errors

ASSETS = Path(__file__).parents[4] / "shared/assets"
EMBEDDED = Path(str(files("llmservices.models"))) / "embedded"
MODELS = {"stories260k": ASSETS / "models/stories260k-llama", "embedded": EMBEDDED}
STORIES = ASSETS / "data/tinystories_sample/train.jsonl"
WINDOW = 200
WINDOWS = 45


def text(model: str) -> str:
    """Of the kind that the model was made for."""
    if model == "embedded":
        rows = embedded_corpus.read_rows(embedded_corpus.HELD_OUT_PATH)
        return "\n\n".join(row.text for row in rows)
    with STORIES.open() as lines:
        return "\n\n".join(json.loads(next(lines))["text"] for _ in range(60))


def folder_of(model: str) -> Path:
    folder = MODELS[model]
    if not folder.exists() or (model == "stories260k" and not STORIES.exists()):
        pytest.skip(f"needs {model} and its text")
    return folder


def perplexity(runner: NativeRunner | PagedRunner, ids: list[int]) -> float:
    loss, count = 0.0, 0
    for start in range(0, WINDOWS * WINDOW, WINDOW):
        part = np.asarray(ids[start : start + WINDOW], dtype=np.int32)
        with torch.inference_mode():
            logits = runner.compute([Work(1, part, 0, range(16), "all")])
        assert logits is not None
        scores = torch.log_softmax(logits.double(), -1)[:-1]
        target = torch.from_numpy(part[1:].astype(np.int64))
        loss -= float(scores.gather(1, target[:, None]).sum())
        count += len(target)
    return math.exp(loss / count)


@pytest.mark.parametrize("model", MODELS)
def test_int8_is_within_half_a_percent_of_float32(functions: Functions, model: str) -> None:
    folder = folder_of(model)
    ids = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text(model)).ids
    assert len(ids) >= WINDOWS * WINDOW

    def fresh() -> Decoder:
        loaded = load(folder, dtype="float32", device=torch.device("cpu"))
        assert isinstance(loaded, Decoder)
        return loaded

    plain = PagedRunner(fresh(), blocks=16, block_tokens=16, exact=False)
    narrow = NativeRunner(
        NativeDecoder(fresh(), "int8", Packer(functions, 1)),
        blocks=16,
        block_tokens=16,
        rows_max=WINDOW,
        threads=1,
    )
    expected = perplexity(plain, ids)
    # Half a percent is what is promised; one scale for a whole row would miss this by half.
    assert abs(perplexity(narrow, ids) / expected - 1) < 0.003


@pytest.mark.parametrize("model", MODELS)
def test_int4_errs_no_more_than_the_plain_rule_on_a_models_tensors(model: str) -> None:
    """Group by group, on every matrix that int4 would hold."""
    tensors = load_file(folder_of(model) / "model.safetensors")
    matrices = [tensor for name, tensor in tensors.items() if name.endswith("proj.weight")]
    assert len(matrices) >= 7 * 4
    for matrix in matrices:
        ours, theirs = int4_errors(matrix.float())
        assert (ours <= theirs * (1 + 1e-4) + 1e-12).all()
        assert ours.mean() < 0.95 * theirs.mean()
