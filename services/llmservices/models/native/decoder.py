"""A decoder whose weights are laid out for the native step.

It takes the weights of a `Decoder`, which is of no use afterwards, one by one: no more than one
matrix is held twice.
"""

import ctypes

import torch

from llmservices.models.decoder import Decoder, Norm
from llmservices.models.decoder import Layer as TorchLayer
from llmservices.models.linear import Linear
from llmservices.models.native import packing
from llmservices.models.native.bindings import (
    Layer,
    Model,
)
from llmservices.models.native.packing import KINDS, Packed, Packer
from llmservices.models.spec import DecoderSpec


def refusal(spec: DecoderSpec, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why the native step cannot compute such a model; None where it can."""
    plain = (
        spec.norm == "rms"
        and spec.norm_offset == 0.0
        and spec.activation == "silu"
        and spec.gated
        and not spec.parallel_residual
        and spec.attention_softcap is None
        and spec.final_softcap is None
        and spec.embedding_scale == 1.0
        and len(spec.ropes) == 1
        and 2 * len(spec.ropes[0].inverse_frequencies) == spec.head_dim
    )
    if not plain:
        return f"native step does not know family {spec.family}"
    if device.type != "cpu":
        return "native step is for CPUs"
    if dtype not in KINDS:
        return f"native step does not know {dtype}"
    return None


class NativeDecoder:
    """What the library is told of a model, and the memory behind it."""

    def __init__(self, model: Decoder, precision: str, packer: Packer) -> None:
        """Takes the weights out of `model`; the caller has asked `refusal`.

        `precision` of the weights: `auto` (the model's own), int8 or int4. The head of an int4
        model is int8: its errors go straight into the logits.
        """
        assert refusal(model.spec, model.dtype, model.device) is None
        self.spec: DecoderSpec = model.spec
        self.dtype: torch.dtype = model.dtype
        self.device: torch.device = model.device
        self.precision = (
            str(self.dtype).removeprefix("torch.") if precision == "auto" else precision
        )
        self.functions = packer.functions
        self._packer = packer
        self._held: list[Packed | torch.Tensor | ctypes.Array[ctypes.c_float]] = []
        parts, bias = model.head.take()
        tied = packing.same_storage(parts[0], model.embedding_VC)
        # What is kept is a copy: the weights may be views of a file.
        self._embedding = None if tied else model.embedding_VC.clone()
        packed_head = packer.pack(parts, bias, "int8" if precision == "int4" else precision)
        self._head = packed_head
        del parts
        model.embedding_VC = torch.empty(0, dtype=self.dtype)
        self.layers = [
            self._layer(layer, index, precision) for index, layer in enumerate(model.layers)
        ]
        self._final_norm = self._norm(model.final_norm)
        rope = self.spec.ropes[0]
        self._frequencies = packing.array_of(rope.inverse_frequencies)
        packs = [held for held in self._held if isinstance(held, Packed)]
        self.weight_bytes = packed_head.bytes + sum(packed.bytes for packed in packs)
        if self._embedding is not None:
            self.weight_bytes += self._embedding.nbytes
        self.functions.llm_trim()

    @property
    def context_tokens(self) -> int:
        return self.spec.context_tokens

    @property
    def vocab_tokens(self) -> int:
        return self.spec.vocab_tokens

    @property
    def family(self) -> str:
        return self.spec.family

    @property
    def kv_token_bytes(self) -> int:
        spec = self.spec
        wide = -(-spec.head_dim // 16) * 16
        return 2 * spec.layers * spec.kv_heads * wide * self.dtype.itemsize

    def struct(self, layers: "ctypes.Array[Layer]", block_tokens: int) -> Model:
        """The whole description; this object and `layers` must outlive every use."""
        spec = self.spec
        return Model(
            ctypes.cast(layers, ctypes.POINTER(Layer)),
            packing.pointer(self._embedding),
            self._final_norm,
            ctypes.addressof(self._frequencies),
            self._head.struct(),
            spec.layers,
            KINDS[self.dtype],
            spec.hidden,
            spec.heads,
            spec.kv_heads,
            spec.head_dim,
            spec.inner,
            spec.vocab_tokens,
            block_tokens,
            0,
            spec.norm_eps,
            spec.attention_scale,
            spec.ropes[0].scale,
            0.0,
        )

    def _layer(self, layer: TorchLayer, index: int, precision: str) -> Layer:
        """All but its cache."""

        def packed(linear: Linear, *, gate_up: bool = False, grouped: bool = False) -> Packed:
            parts, bias = linear.take()
            if gate_up and len(parts) == 1:
                parts = list(parts[0].chunk(2))
            made = self._packer.pack(parts, bias, precision, in_turns=gate_up, grouped=grouped)
            self._held.append(made)
            return made

        q_norm, k_norm = layer.q_norm, layer.k_norm
        return Layer(
            packed(layer.qkv).struct(),
            packed(layer.out).struct(),
            packed(layer.up, gate_up=True).struct(),
            # What goes into it has a few numbers far wider than all others.
            packed(layer.down, grouped=True).struct(),
            self._norm(layer.attention_norm),
            self._norm(layer.mlp_norm),
            None if q_norm is None else self._norm(q_norm),
            None if k_norm is None else self._norm(k_norm),
            None,
            self.spec.windows[index] or 0,
            0,
        )

    def _norm(self, norm: Norm) -> int:
        weight = packing.own(norm.weight)
        self._held.append(weight)
        return weight.data_ptr()
