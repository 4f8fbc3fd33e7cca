"""Dropout by cheap bits."""

import pytest
import torch
from llmservices.trainer.dropout import dropout, kept_mask


@pytest.mark.parametrize("probability", [0.1, 0.5, 0.9])
def test_share_and_mean(probability: float) -> None:
    torch.manual_seed(0)
    mask = kept_mask(torch.empty(999, 1001), probability)
    assert (mask == 0).double().mean().item() == pytest.approx(probability, abs=2e-3)
    assert mask.double().mean().item() == pytest.approx(1.0, abs=5e-3)
    assert len(set(mask.flatten()[:1000].tolist())) == 2


def test_gradient_is_that_of_the_mask() -> None:
    x = torch.ones(1000, requires_grad=True)
    y = dropout(x, 0.3, training=True)
    torch.autograd.backward(y.sum())
    assert x.grad is not None and torch.equal(x.grad, y)


def test_nothing_outside_training() -> None:
    x = torch.ones(10)
    assert dropout(x, 0.5, training=False) is x
    assert dropout(x, 0.0, training=True) is x
