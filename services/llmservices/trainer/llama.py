"""Llama, Mistral and Qwen2 without scaled or windowed attention, for training.

Parameters are named as the Hugging Face architecture names them.  Source: Touvron et al. 2023
(arXiv 2302.13971), section 2; rotary positions: Su et al. 2021 (arXiv 2104.09864).
Legend: N tokens, C width, H heads, G key/value heads, D width of a head, S sequences.
"""

from typing import Any, cast

import msgspec
import torch
from torch import nn
from torch.nn import functional

from llmservices.trainer.attention import attend
from llmservices.trainer.documents import Documents
from llmservices.trainer.learner import Learner


class LlamaSpec(msgspec.Struct, frozen=True):
    """Shapes."""

    vocabulary: int
    width: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    head_width: int
    context_tokens: int
    norm_epsilon: float = 1e-6
    rope_theta: float = 10000.0
    tied: bool = True
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    labels: int = 0
    """Of a classifier; 1 of a regression; 0 of a generator."""
    attention_dropout: float = 0.0
    deviation: float = 0.02
    """Of new weights."""


class _Rotate(torch.autograd.Function):
    """Rotates the pairs (i, i + D/2) of each head by its position's angle."""

    @staticmethod
    def forward(
        ctx: Any,  # Any: torch's context has no type
        x_NHD: torch.Tensor,
        cosine_N1D: torch.Tensor,
        sine_N1D: torch.Tensor,
    ) -> torch.Tensor:
        ctx.save_for_backward(cosine_N1D, sine_N1D)
        return _rotated(x_NHD, cosine_N1D, sine_N1D)

    @staticmethod
    def backward(
        ctx: Any,  # Any: torch's context has no type
        gradient: torch.Tensor,
    ) -> tuple[torch.Tensor, None, None]:
        cosine_N1D, sine_N1D = ctx.saved_tensors
        return _rotated(gradient, cosine_N1D, -sine_N1D), None, None


def _rotated(x_NHD: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    first, second = x_NHD.chunk(2, dim=-1)
    out = torch.empty(x_NHD.shape, dtype=x_NHD.dtype, device=x_NHD.device)
    half = first.shape[-1]
    torch.mul(first, cosine, out=out[..., :half]).addcmul_(second, sine, value=-1)
    torch.mul(second, cosine, out=out[..., half:]).addcmul_(first, sine)
    return out


class RmsNorm(nn.Module):
    """Zhang and Sennrich 2019 (arXiv 1910.07467)."""

    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self._epsilon = epsilon

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.rms_norm(x, self.weight.shape, self.weight, self._epsilon)


class _Attention(nn.Module):
    def __init__(self, spec: LlamaSpec) -> None:
        super().__init__()
        width, d = spec.width, spec.head_width
        self._shape = (spec.heads, spec.kv_heads, d)
        self._dropout = spec.attention_dropout
        self.q_proj = nn.Linear(width, spec.heads * d, bias=spec.qkv_bias)
        self.k_proj = nn.Linear(width, spec.kv_heads * d, bias=spec.qkv_bias)
        self.v_proj = nn.Linear(width, spec.kv_heads * d, bias=spec.qkv_bias)
        self.o_proj = nn.Linear(spec.heads * d, width, bias=spec.out_bias)

    def forward(
        self,
        x_NC: torch.Tensor,
        cosine: torch.Tensor,
        sine: torch.Tensor,
        documents: Documents,
    ) -> torch.Tensor:
        heads, kv_heads, d = self._shape
        rotate: Any = _Rotate  # Any: Function.apply has no types
        mixed_NHD = attend(
            rotate.apply(self.q_proj(x_NC).view(-1, heads, d), cosine, sine),
            rotate.apply(self.k_proj(x_NC).view(-1, kv_heads, d), cosine, sine),
            self.v_proj(x_NC).view(-1, kv_heads, d),
            documents,
            causal=True,
            dropout=self._dropout if self.training else 0.0,
        )
        return cast(torch.Tensor, self.o_proj(mixed_NHD.reshape(x_NC.shape[0], heads * d)))


class _Mlp(nn.Module):
    def __init__(self, spec: LlamaSpec) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(spec.width, spec.inner, bias=spec.mlp_bias)
        self.up_proj = nn.Linear(spec.width, spec.inner, bias=spec.mlp_bias)
        self.down_proj = nn.Linear(spec.inner, spec.width, bias=spec.mlp_bias)

    def forward(self, x_NC: torch.Tensor) -> torch.Tensor:
        gated = functional.silu(self.gate_proj(x_NC)) * self.up_proj(x_NC)
        return cast(torch.Tensor, self.down_proj(gated))


class _Layer(nn.Module):
    def __init__(self, spec: LlamaSpec) -> None:
        super().__init__()
        self.self_attn = _Attention(spec)
        self.mlp = _Mlp(spec)
        self.input_layernorm = RmsNorm(spec.width, spec.norm_epsilon)
        self.post_attention_layernorm = RmsNorm(spec.width, spec.norm_epsilon)

    def forward(
        self, x_NC: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor, documents: Documents
    ) -> torch.Tensor:
        x_NC = x_NC + self.self_attn(self.input_layernorm(x_NC), cosine, sine, documents)
        return x_NC + cast(torch.Tensor, self.mlp(self.post_attention_layernorm(x_NC)))


class _Body(nn.Module):
    def __init__(self, spec: LlamaSpec) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(spec.vocabulary, spec.width)
        self.layers = nn.ModuleList(_Layer(spec) for _ in range(spec.layers))
        self.norm = RmsNorm(spec.width, spec.norm_epsilon)


class Llama(Learner):
    """The model with its head."""

    def __init__(self, spec: LlamaSpec) -> None:
        super().__init__()
        self.spec = spec
        self.context_tokens, self.vocabulary = spec.context_tokens, spec.vocabulary
        self.task = "generate" if not spec.labels else "regress" if spec.labels == 1 else "classify"
        self.model = _Body(spec)
        if spec.labels:
            self.score = nn.Linear(spec.width, spec.labels, bias=False)
        elif not spec.tied:
            self.lm_head = nn.Linear(spec.width, spec.vocabulary, bias=False)

    def initialise(self) -> None:
        """New weights, as the published ones began: normal, norms one, biases zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=self.spec.deviation)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def hidden(self, documents: Documents) -> torch.Tensor:
        half = self.spec.head_width // 2
        rates = self.spec.rope_theta ** (
            -torch.arange(half, dtype=torch.float64, device=documents.ids_N.device) / half
        )
        angles = documents.positions_N[:, None, None] * rates
        cosine, sine = angles.cos().float(), angles.sin().float()
        x_NC = self.model.embed_tokens(documents.ids_N)
        for layer in self.model.layers:
            x_NC = self.layer(layer, x_NC, cosine, sine, documents)
        return cast(torch.Tensor, self.model.norm(x_NC))

    def head_weight(self) -> torch.Tensor:
        return self.model.embed_tokens.weight if self.spec.tied else self.lm_head.weight

    def judge(self, documents: Documents) -> torch.Tensor:
        last_SC = self.hidden(documents).index_select(0, documents.lasts_S)
        return cast(torch.Tensor, self.score(last_SC))
