"""Small random decoders of many shapes, made anew at each call: the native step takes weights."""

import msgspec
import pytest
import torch
from llmservices.models.decoder import Decoder, Layer, Norm
from llmservices.models.linear import Linear
from llmservices.models.native import build
from llmservices.models.native.bindings import Functions, open_library
from llmservices.models.rope import Rope
from llmservices.models.spec import DecoderSpec

from tests.services.models.native.reference import padded, quantise_int4


class Small(msgspec.Struct, frozen=True, kw_only=True):
    """Numbers of a decoder; none needs to be a multiple of anything."""

    hidden: int = 48
    layers: int = 2
    heads: int = 6
    kv_heads: int = 2
    head_dim: int = 8
    inner: int = 76
    vocab: int = 101
    biased: bool = False
    normed: bool = False
    tied: bool = False
    window: int | None = None
    dtype: torch.dtype = torch.float32

    def make(self, *, widened: bool = False, precision: str = "auto") -> Decoder:
        """The same one every time; `widened`: the same numbers in float32; with a `precision`, what
        is left of them after a round trip through it."""
        generator = torch.Generator().manual_seed(3)
        stored = torch.float32 if widened else self.dtype
        head_precision = "int8" if precision == "int4" else precision

        def weight(*sizes: int) -> torch.Tensor:
            drawn = torch.randn(*sizes, generator=generator) * float(1.5 * sizes[-1] ** -0.5)
            return drawn.to(self.dtype).to(stored)

        def norm(width: int) -> Norm:
            drawn = 1 + 0.2 * torch.randn(width, generator=generator)
            return Norm(drawn.to(self.dtype).to(stored), None, eps=1e-5, offset=0.0, rms=True)

        def linear(out: int, features: int) -> Linear:
            drawn = rounded(weight(out, features), precision)
            return Linear(drawn, bias=weight(out) if self.biased else None)

        query, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        embedding = weight(self.vocab, self.hidden)
        if self.tied:
            embedding = rounded(embedding, head_precision)
        spec = DecoderSpec(
            family="small",
            hidden=self.hidden,
            layers=self.layers,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            inner=self.inner,
            vocab_tokens=self.vocab,
            context_tokens=1024,
            norm_eps=1e-5,
            activation="silu",
            ropes=[Rope.plain(10_000.0, self.head_dim)],
            rope_of=[0] * self.layers,
            windows=[self.window] + [None] * (self.layers - 1),
            attention_scale=self.head_dim**-0.5,
        )
        return Decoder(
            spec,
            embedding_VC=embedding,
            positions_TC=None,
            layers=[
                Layer(
                    attention_norm=norm(self.hidden),
                    qkv=linear(query + 2 * kv, self.hidden),
                    out=linear(self.hidden, query),
                    mlp_norm=norm(self.hidden),
                    up=linear(2 * self.inner, self.hidden),
                    down=linear(self.hidden, self.inner),
                    q_norm=norm(self.head_dim) if self.normed else None,
                    k_norm=norm(self.head_dim) if self.normed else None,
                )
                for _ in range(self.layers)
            ],
            final_norm=norm(self.hidden),
            head=Linear(
                embedding if self.tied else rounded(weight(self.vocab, self.hidden), head_precision)
            ),
        )


def rounded(weight: torch.Tensor, precision: str) -> torch.Tensor:
    """What a precision leaves of a matrix."""
    if precision == "auto":
        return weight
    if precision == "int8":
        scales = weight.abs().amax(1, keepdim=True) / 127
        return (weight / scales).round() * scales
    numbers, scales = quantise_int4(padded(weight))
    return (numbers * scales).flatten(1)[: len(weight), : weight.shape[1]].contiguous()


def int4_errors(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Squared error of each group of 32 along the depth: ours, and that of q4_0's rule (the number
    of greatest magnitude becomes -8, the scale has half precision) on the same numbers."""
    groups = padded(weight)
    numbers, scales = quantise_int4(groups)
    groups = groups.view(len(groups), -1, 32)
    ours = (groups - numbers * scales).square().sum(-1)
    widest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    scale = widest / -8
    inverse = torch.where(scale != 0, 1 / scale, 0.0)
    plain = (groups * inverse + 8.5).floor().clamp(0, 15) - 8
    theirs = (groups - plain * scale.half().float()).square().sum(-1)
    return ours, theirs


def functions_or_skip() -> Functions:
    """The library that the installation has built. Tests do not compile: it takes half a minute of
    a core."""
    found = open_library()
    if isinstance(found, str):
        message = f"{found}: python -m llmservices.models.native.build"
        if build.LIBRARY.exists():
            pytest.fail(message)
        pytest.skip(message)
    return found
