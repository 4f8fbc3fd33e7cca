"""How a base becomes a model to train."""

import pytest
import torch
from llmproto.errors import RemoteError
from llmservices.trainer.building import _precision


def test_the_precision_of_a_base_is_that_of_its_weights() -> None:
    """Encoders of the library keep the numbers of their positions first: whole numbers."""
    positions = torch.arange(4)
    assert _precision([positions, torch.zeros(2, dtype=torch.bfloat16)]) is torch.bfloat16
    with pytest.raises(RemoteError, match="no weights that are floating-point"):
        _precision([positions])
