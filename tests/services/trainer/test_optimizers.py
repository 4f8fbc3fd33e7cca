"""The table, and which parameters decay."""

import pytest
import torch
from llmproto.errors import RemoteError
from llmproto.recipes import TrainingRecipe
from llmservices.trainer import optimizers
from torch import nn


@pytest.mark.parametrize("name", sorted(optimizers.TABLE))
def test_each_learns(name: str) -> None:
    torch.manual_seed(0)
    module = nn.Linear(4, 1)
    # Adadelta's own rate begins at about sqrt(epsilon).
    recipe = TrainingRecipe(optimizer=name, learning_rate=1.0 if name == "adadelta" else 0.05)
    optimizer = optimizers.build(recipe, module.named_parameters())
    x, y = torch.randn(64, 4), torch.randn(64, 1)
    found = []
    for _ in range(40):
        loss = (module(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    assert found[-1] < found[0]


def test_vectors_do_not_decay() -> None:
    module = nn.Linear(4, 2)
    recipe = TrainingRecipe(weight_decay=0.1)
    groups = optimizers.build(recipe, module.named_parameters()).param_groups
    assert [(len(group["params"]), group["weight_decay"]) for group in groups] == [
        (1, 0.1),
        (1, 0.0),
    ]
    recipe = TrainingRecipe(weight_decay=0.1, decay_all=True)
    groups = optimizers.build(recipe, module.named_parameters()).param_groups
    assert [(len(group["params"]), group["weight_decay"]) for group in groups] == [(2, 0.1)]


def test_an_unknown_one() -> None:
    with pytest.raises(RemoteError, match="'lion'; there are adadelta, adagrad, adam, adamw"):
        optimizers.build(TrainingRecipe(optimizer="lion"), nn.Linear(1, 1).named_parameters())
