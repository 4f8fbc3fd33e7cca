"""Small random decoders with the switches of every family, and steps for them."""

from typing import Any

import numpy as np
import torch
from llmservices.executor.runner import Runner, Work
from llmservices.models.decoder import Decoder, Layer, Norm
from llmservices.models.linear import Linear
from llmservices.models.rope import Rope
from llmservices.models.spec import DecoderSpec

HIDDEN, LAYERS, HEADS, KV_HEADS, DIMS, INNER, VOCAB, CONTEXT = 40, 2, 6, 2, 8, 52, 61, 256
BLOCK_TOKENS, ROOM = 4, 24

FAMILIES: dict[str, dict[str, Any]] = {  # Any: keyword arguments of a spec
    "llama": {},
    "window": {"windows": [7, None]},
    "qwen3": {"normed": True},
    "gemma": {
        "windows": [5, None],
        "activation": "gelu_tanh",
        "norm_offset": 1.0,
        "normed": True,
        "posts": True,
        "embedding_scale": HIDDEN**0.5,
        "attention_softcap": 20.0,
        "final_softcap": 15.0,
    },
    "gpt2": {
        "norm": "layer",
        "gated": False,
        "activation": "gelu_tanh",
        "ropes": [],
        "kv_heads": HEADS,
    },
    "gpt_neox": {
        "norm": "layer",
        "gated": False,
        "activation": "gelu",
        "parallel_residual": True,
        "ropes": [Rope.plain(10_000.0, 4)],
        "kv_heads": HEADS,
    },
    "odd heads": {"head_dim": 10, "heads": 3, "kv_heads": 1, "activation": "gelu"},
}


def make(
    family: str,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    normed: bool = False,
    posts: bool = False,
) -> Decoder:
    """The same one every time."""
    switches = dict(FAMILIES[family])
    normed, posts = switches.pop("normed", normed), switches.pop("posts", posts)
    dims = switches.get("head_dim", DIMS)
    spec = DecoderSpec(
        **{
            "family": family,
            "hidden": HIDDEN,
            "layers": LAYERS,
            "heads": HEADS,
            "kv_heads": KV_HEADS,
            "head_dim": dims,
            "inner": INNER,
            "vocab_tokens": VOCAB,
            "context_tokens": CONTEXT,
            "norm_eps": 1e-5,
            "activation": "silu",
            "ropes": [Rope.plain(10_000.0, dims)],
            "rope_of": [0] * LAYERS,
            "windows": [None] * LAYERS,
            "attention_scale": dims**-0.5,
            **switches,
        }
    )
    generator = torch.Generator().manual_seed(4)

    def weight(*sizes: int) -> torch.Tensor:
        drawn = torch.randn(*sizes, generator=generator) * float(1.5 * sizes[-1] ** -0.5)
        return drawn.to(device, dtype)

    def norm(width: int) -> Norm:
        weights = weight(width) * 0.3 + (0.0 if spec.norm_offset else 1.0)
        rms = spec.norm == "rms"
        return Norm(
            weights, None if rms else weight(width), eps=1e-5, offset=spec.norm_offset, rms=rms
        )

    query, kv = spec.heads * dims, spec.kv_heads * dims
    return Decoder(
        spec,
        embedding_VC=weight(VOCAB, HIDDEN),
        positions_TC=None if spec.ropes else weight(CONTEXT, HIDDEN),
        layers=[
            Layer(
                attention_norm=norm(HIDDEN),
                qkv=Linear(weight(query + 2 * kv, HIDDEN), bias=weight(query + 2 * kv)),
                out=Linear(weight(HIDDEN, query)),
                mlp_norm=norm(HIDDEN),
                up=Linear(weight((1 + spec.gated) * INNER, HIDDEN)),
                down=Linear(weight(HIDDEN, INNER)),
                q_norm=norm(dims) if normed else None,
                k_norm=norm(dims) if normed else None,
                post_attention_norm=norm(HIDDEN) if posts else None,
                post_mlp_norm=norm(HIDDEN) if posts else None,
            )
            for _ in range(LAYERS)
        ],
        final_norm=norm(HIDDEN),
        head=Linear(weight(VOCAB, HIDDEN) * 2),
    )


def work(thread: int, start: int, tokens: int, wanted: str = "last") -> Work:
    """Rows of a thread whose blocks stand in no order."""
    ids = (np.arange(start, start + tokens) * 7 + thread * 5) % VOCAB
    blocks = [(37 * i + 11) % (8 * ROOM) for i in range(thread * ROOM, (thread + 1) * ROOM)]
    return Work(thread, ids.astype(np.int32), start, blocks, wanted)  # type: ignore[arg-type]


STEPS: list[list[Work]] = [
    [work(0, 0, 19, "none"), work(1, 0, 3), work(2, 0, 1), work(3, 0, 33)],
    [work(0, 19, 1), work(1, 3, 1), work(2, 1, 1)],
    [work(0, 20, 1)],
    [work(0, 21, 1), work(2, 2, 1, "none"), work(1, 4, 22, "all"), work(4, 0, 40)],
    [work(thread, start, 1) for thread, start in enumerate((22, 26, 3, 33, 40))],
]
"""Prefills alone and beside decodes, chunks, and decodes of several contexts."""
SHORT: list[list[Work]] = [
    [work(0, 0, 9, "none"), work(1, 0, 3), work(2, 0, 1)],
    [work(0, 9, 1), work(1, 3, 1), work(2, 1, 1)],
    [work(0, 10, 1), work(1, 4, 4, "all")],
]
"""The same for an interpreter."""


def logits(runner: Runner, steps: list[list[Work]]) -> list[torch.Tensor]:
    """Of every step, in float32 on the CPU."""
    with torch.inference_mode():
        found = [runner.compute(step) for step in steps]
        return [each.float().cpu() for each in found if each is not None]
