"""Rates equal transformers' at every step."""

import pytest
import torch
from llmproto.recipes import TrainingRecipe
from llmservices.trainer.schedules import rate
from transformers import get_scheduler

STEPS = 50


@pytest.mark.parametrize("name", ["constant", "linear", "cosine", "inverse_sqrt"])
@pytest.mark.parametrize("warmup", [0, 7])
def test_as_transformers(name: str, warmup: int) -> None:
    recipe = TrainingRecipe(learning_rate=0.5, schedule=name, warmup_steps=warmup)  # type: ignore[arg-type]  # one of its words
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    theirs = get_scheduler(
        "constant_with_warmup" if name == "constant" else name,
        optimizer,
        num_warmup_steps=warmup,
        num_training_steps=STEPS,
    )
    for step in range(STEPS):
        assert rate(recipe, step, STEPS) == pytest.approx(theirs.get_last_lr()[0], rel=1e-9)
        optimizer.step()
        theirs.step()


def test_the_lowest_rate() -> None:
    recipe = TrainingRecipe(learning_rate=1.0, schedule="cosine", learning_rate_min=0.25)
    assert rate(recipe, STEPS, STEPS) == 0.25
    assert rate(recipe, 0, STEPS) == 1.0
    assert rate(recipe, STEPS + 10, STEPS) == 0.25
