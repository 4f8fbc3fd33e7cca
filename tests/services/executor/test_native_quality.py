"""What int8 weights cost on real text: perplexity against float32's."""

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
from tokenizers import Tokenizer

MODELS = files("llmservices.models")
STORIES = Path(__file__).parents[4] / "shared/assets/models/stories260k-llama"
EMBEDDED = Path(str(MODELS / "embedded"))
WINDOW = 200


def text() -> str:
    return "\n\n".join(each.text for each in embedded_corpus.read())


def perplexity(runner: NativeRunner | PagedRunner, ids: list[int], windows: int) -> float:
    loss, count = 0.0, 0
    for start in range(0, windows * WINDOW, WINDOW):
        part = np.asarray(ids[start : start + WINDOW], dtype=np.int32)
        with torch.inference_mode():
            logits = runner.compute([Work(1, part, 0, range(16), "all")])
        assert logits is not None
        scores = torch.log_softmax(logits.double(), -1)[:-1]
        target = torch.from_numpy(part[1:].astype(np.int64))
        loss -= float(scores.gather(1, target[:, None]).sum())
        count += len(target)
    return math.exp(loss / count)


@pytest.mark.parametrize("folder", [STORIES, EMBEDDED], ids=["stories260k", "embedded"])
def test_int8_is_within_half_a_percent_of_float32(functions: Functions, folder: Path) -> None:
    if not folder.exists():
        pytest.skip(f"needs {folder.name}")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = tokenizer.encode(text()[:60_000]).ids
    windows = min(40, len(ids) // WINDOW)

    def fresh() -> Decoder:
        model = load(folder, dtype="float32", device=torch.device("cpu"))
        assert isinstance(model, Decoder)
        return model

    plain = PagedRunner(fresh(), blocks=16, block_tokens=16, exact=False)
    narrow = NativeRunner(
        NativeDecoder(fresh(), "int8", functions),
        blocks=16,
        block_tokens=16,
        rows_max=WINDOW,
        threads=1,
    )
    expected = perplexity(plain, ids, windows)
    assert perplexity(narrow, ids, windows) < 1.005 * expected
