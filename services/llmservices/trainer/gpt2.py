"""GPT-2, for training: learned positions, layer norms before, one linear for q, k and v.

Linear weights stand output-first here and input-first in the published files, and biases may be
left out: `exported` writes them as the files have them.
Source: Radford et al. 2019, section 2.3: residual projections begin smaller by sqrt(2 x layers).
Legend: N tokens, C width, H heads, D width of a head.
"""

from collections.abc import Mapping
from typing import cast

import msgspec
import torch
from torch import nn
from torch.nn import functional

from llmservices.trainer.attention import attend
from llmservices.trainer.documents import Documents
from llmservices.trainer.dropout import dropout
from llmservices.trainer.learner import Learner


class Gpt2Spec(msgspec.Struct, frozen=True):
    """Shapes."""

    vocabulary: int
    width: int
    inner: int
    layers: int
    heads: int
    context_tokens: int
    tied: bool = True
    bias: bool = True
    dropout: float = 0.0
    norm_epsilon: float = 1e-5
    gelu: str = "none"
    """torch's name of the approximation: `none`, `tanh`."""


class _Norm(nn.Module):
    def __init__(self, spec: Gpt2Spec) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(spec.width))
        self.bias = nn.Parameter(torch.zeros(spec.width)) if spec.bias else None
        self._epsilon = spec.norm_epsilon

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.layer_norm(x, self.weight.shape, self.weight, self.bias, self._epsilon)


class _Attention(nn.Module):
    def __init__(self, spec: Gpt2Spec) -> None:
        super().__init__()
        self._spec = spec
        self.c_attn = nn.Linear(spec.width, 3 * spec.width, bias=spec.bias)
        self.c_proj = nn.Linear(spec.width, spec.width, bias=spec.bias)

    def forward(self, x_NC: torch.Tensor, documents: Documents) -> torch.Tensor:
        spec = self._spec
        qkv = self.c_attn(x_NC).view(x_NC.shape[0], 3, spec.heads, spec.width // spec.heads)
        q, k, v = qkv.unbind(1)
        chance = spec.dropout if self.training else 0.0
        mixed = attend(q, k, v, documents, causal=True, dropout=chance)
        out = self.c_proj(mixed.reshape(x_NC.shape))
        return dropout(out, spec.dropout, training=self.training)


class _Mlp(nn.Module):
    def __init__(self, spec: Gpt2Spec) -> None:
        super().__init__()
        self._spec = spec
        self.c_fc = nn.Linear(spec.width, spec.inner, bias=spec.bias)
        self.c_proj = nn.Linear(spec.inner, spec.width, bias=spec.bias)

    def forward(self, x_NC: torch.Tensor) -> torch.Tensor:
        inner = functional.gelu(self.c_fc(x_NC), approximate=self._spec.gelu)
        return dropout(self.c_proj(inner), self._spec.dropout, training=self.training)


class _Layer(nn.Module):
    def __init__(self, spec: Gpt2Spec) -> None:
        super().__init__()
        self.ln_1 = _Norm(spec)
        self.attn = _Attention(spec)
        self.ln_2 = _Norm(spec)
        self.mlp = _Mlp(spec)

    def forward(self, x_NC: torch.Tensor, documents: Documents) -> torch.Tensor:
        x_NC = x_NC + self.attn(self.ln_1(x_NC), documents)
        return x_NC + cast(torch.Tensor, self.mlp(self.ln_2(x_NC)))


class _Body(nn.Module):
    def __init__(self, spec: Gpt2Spec) -> None:
        super().__init__()
        self.wte = nn.Embedding(spec.vocabulary, spec.width)
        self.wpe = nn.Embedding(spec.context_tokens, spec.width)
        self.h = nn.ModuleList(_Layer(spec) for _ in range(spec.layers))
        self.ln_f = _Norm(spec)


class Gpt2(Learner):
    """A generator."""

    task = "generate"

    def __init__(self, spec: Gpt2Spec) -> None:
        super().__init__()
        self.spec = spec
        self.context_tokens, self.vocabulary = spec.context_tokens, spec.vocabulary
        self.transformer = _Body(spec)
        if not spec.tied:
            self.lm_head = nn.Linear(spec.width, spec.vocabulary, bias=False)

    def initialise(self) -> None:
        """New weights."""
        for name, module in self.named_modules():
            if not isinstance(module, nn.Linear | nn.Embedding):
                continue
            smaller = (2 * self.spec.layers) ** -0.5 if name.endswith("c_proj") else 1.0
            nn.init.normal_(module.weight, std=0.02 * smaller)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def hidden(self, documents: Documents) -> torch.Tensor:
        body = self.transformer
        x_NC = body.wte(documents.ids_N) + body.wpe(documents.positions_N)
        x_NC = dropout(x_NC, self.spec.dropout, training=self.training)
        for layer in body.h:
            x_NC = self.layer(layer, x_NC, documents)
        return cast(torch.Tensor, body.ln_f(x_NC))

    def head_weight(self) -> torch.Tensor:
        return self.transformer.wte.weight if self.spec.tied else self.lm_head.weight

    def exported(self) -> dict[str, torch.Tensor]:
        weights: dict[str, torch.Tensor] = {}
        for name, module in self.named_modules():
            if isinstance(module, nn.Embedding) or name == "lm_head":
                weights[f"{name}.weight"] = cast(torch.Tensor, module.weight).detach()
            elif isinstance(module, nn.Linear):
                weights[f"{name}.weight"] = module.weight.detach().t()
                weights[f"{name}.bias"] = _bias(module.bias, module.out_features)
            elif isinstance(module, _Norm):
                weights[f"{name}.weight"] = module.weight.detach()
                weights[f"{name}.bias"] = _bias(module.bias, self.spec.width)
        return weights

    def load_exported(self, weights: Mapping[str, torch.Tensor]) -> None:
        """The inverse of `exported`."""
        for name, parameter in self.named_parameters():
            stored = weights[name]
            module = self.get_submodule(name.rpartition(".")[0])
            turned = isinstance(module, nn.Linear) and name != "lm_head.weight"
            with torch.no_grad():
                parameter.copy_(stored.t() if turned and stored.dim() == 2 else stored)


def _bias(bias: torch.Tensor | None, width: int) -> torch.Tensor:
    return torch.zeros(width) if bias is None else bias.detach()
