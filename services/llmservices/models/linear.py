"""Matrix products with weights, laid out once for the device that they run on."""

from collections.abc import Callable
from typing import Final

import torch
from torch.nn import functional

from llmservices.models.spec import Activation


class Linear:
    """y = x W^T + b.

    On CPU the weight is reordered for oneDNN at its first use, which reads it 1.5 to 2 times
    faster than the plain layout at the row counts of a decode step; the plain copy is then dropped.
    """

    __slots__ = (
        "_bias", "_packable", "_packed", "_parts", "_weight", "bytes", "features_in",
        "features_out",
    )  # fmt: skip

    def __init__(self, *parts: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        """The rows of the weight, in one part or several; on CPU they are joined at the first
        use."""
        self.features_out = sum(len(part) for part in parts)
        self.features_in = parts[0].shape[1]
        self.bytes = sum(part.nbytes for part in parts)
        self._bias = bias
        self._packable = parts[0].device.type == "cpu" and parts[0].dtype in (
            torch.float32,
            torch.bfloat16,
        )
        self._packed = False
        self._parts = [part.contiguous() for part in parts]
        self._weight = torch.empty(0)
        if not self._packable:
            self._join()

    def take(self) -> tuple[list[torch.Tensor], torch.Tensor | None]:
        """The weight's parts and the bias as they were given, to be laid out otherwise; this object
        cannot be used afterwards.  Only before the first use."""
        assert self._parts
        taken = self._parts, self._bias
        self._parts, self._bias = [], None
        return taken

    def _join(self) -> None:
        assert self._parts, "the weight was taken"
        self._weight = self._parts[0] if len(self._parts) == 1 else torch.cat(self._parts)
        self._parts = []

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if not self._laid_out():
            return functional.linear(x, self._weight, self._bias)
        y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
            x, self._weight, self._bias, "none", [], ""
        )
        return y

    def _laid_out(self) -> bool:
        """Whether the weight is in oneDNN's layout, into which it is brought where it can be."""
        if self._packable and not self._packed:
            self._join()
            self._weight = torch.ops.mkldnn._reorder_linear_weight(self._weight, _ROWS_HINT)
            self._packed = True
        return self._packed

    def activated(self, x: torch.Tensor, activation: Activation) -> torch.Tensor:
        """The activation of y; in one pass over it where the library can."""
        fused = _FUSED.get(activation)
        if fused is None or not self._laid_out():
            return _ACTIVATED[activation](self(x))
        name, algorithm = fused
        y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
            x, self._weight, self._bias, name, [], algorithm
        )
        return y


_FUSED: Final = {"gelu": ("gelu", "none"), "gelu_tanh": ("gelu", "tanh"), "relu": ("relu", "")}
_ACTIVATED: Final[dict[Activation, Callable[[torch.Tensor], torch.Tensor]]] = {
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
    "silu": functional.silu,
}
_ROWS_HINT = 32
"""The layout is chosen for so many rows and serves every other count too."""
