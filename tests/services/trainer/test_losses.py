"""The head's loss, computed by parts."""

import pytest
import torch
from llmservices.trainer import losses
from llmservices.trainer.losses import head_loss, value_loss
from torch.nn import functional


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("chunk", [7 * 11, 1 << 22])
def test_head_loss(monkeypatch: pytest.MonkeyPatch, smoothing: float, chunk: int) -> None:
    monkeypatch.setattr(losses, "CHUNK_LOGITS", chunk)
    torch.manual_seed(0)
    hidden = torch.randn(20, 8, requires_grad=True)
    weight = torch.randn(11, 8, requires_grad=True)
    targets = torch.randint(0, 11, (20,))
    found = head_loss(hidden, weight, targets, smoothing=smoothing)
    torch.autograd.backward(found / 20)
    ours = (hidden.grad, weight.grad)
    hidden.grad = weight.grad = None
    expected = functional.cross_entropy(hidden @ weight.t(), targets, label_smoothing=smoothing)
    torch.autograd.backward(expected)
    assert found.item() / 20 == pytest.approx(expected.item(), rel=1e-6)
    assert ours[0] is not None and ours[1] is not None
    torch.testing.assert_close(ours[0], hidden.grad, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(ours[1], weight.grad, atol=1e-6, rtol=1e-5)
    with torch.no_grad():
        same = head_loss(hidden, weight, targets, smoothing=smoothing)
    assert same.item() == pytest.approx(found.item(), rel=1e-6)


def test_a_frozen_head_gets_no_gradient() -> None:
    hidden = torch.randn(4, 8, requires_grad=True)
    weight = torch.randn(11, 8)
    torch.autograd.backward(head_loss(hidden, weight, torch.tensor([1, 2, 3, 4])))
    assert hidden.grad is not None and weight.grad is None


def test_value_loss() -> None:
    assert value_loss(torch.tensor([1.0, 2.0]), torch.tensor([0.0, 4.0])).item() == 5.0
