"""Linear layers by oneDNN."""

import pytest
import torch
from llmservices.trainer.linears import OneDnnLinear, accelerate, linear
from torch import nn
from torch.nn import functional


@pytest.mark.parametrize("shape", [(5, 7, 3), (64, 32, 128), (64, 128, 32), (1, 16, 16), (9, 8, 2)])
@pytest.mark.parametrize("biased", [False, True])
def test_value_and_gradients(shape: tuple[int, int, int], biased: bool) -> None:
    rows, inputs, outputs = shape
    torch.manual_seed(0)
    x, weight = torch.randn(rows, inputs), torch.randn(outputs, inputs)
    bias = torch.randn(outputs) if biased else None
    out = torch.randn(rows, outputs)
    found = []
    for call in (linear, functional.linear):
        leaves = [each.clone().requires_grad_() for each in (x, weight, bias) if each is not None]
        y = call(leaves[0], leaves[1], leaves[2] if biased else None)
        torch.autograd.backward(y, out)
        found.append([y.detach(), *(each.grad for each in leaves)])
    for ours, torchs in zip(*found):
        torch.testing.assert_close(ours, torchs, atol=1e-4, rtol=1e-4)


def test_accelerate_changes_classes_alone() -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Sequential(nn.Linear(4, 2)))
    before = dict(module.named_parameters())
    assert accelerate(module) == 2
    assert accelerate(module) == 0
    assert [type(each) for each in module.modules()].count(OneDnnLinear) == 2
    assert all(each is before[name] for name, each in module.named_parameters())


def test_autocast_is_obeyed() -> None:
    layer = OneDnnLinear(4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(2, 4)).dtype == torch.bfloat16
