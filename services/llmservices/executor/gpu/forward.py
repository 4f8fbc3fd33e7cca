"""One pass of a decoder over rows whose shapes are known beforehand.

The same layers and the same order as `Decoder.forward`, cut where a GPU's kernels join what
stands between two matrix products.
"""

import torch
from torch.nn import functional

from llmservices.executor.gpu.operations import Operations
from llmservices.models.decoder import Decoder, Layer, activate


def forward(
    model: Decoder,
    operations: Operations,
    tokens_N: torch.Tensor,
    positions_N: torch.Tensor,
    wanted_W: torch.Tensor | None,
) -> torch.Tensor:
    """Logits of the wanted rows; None: of all."""
    spec = model.spec
    x_NC = functional.embedding(tokens_N, model.embedding_VC)
    if spec.embedding_scale != 1.0:
        x_NC = x_NC * model.embedding_scale
    if model.positions_TC is not None:
        x_NC = x_NC + functional.embedding(positions_N, model.positions_TC)
    normed_NC = operations.norm(model.layers[0].attention_norm, x_NC)
    for index, layer in enumerate(model.layers):
        last = index + 1 == spec.layers
        q_NHD = operations.store(index, layer, layer.qkv(normed_NC))
        more_NC = layer.out(operations.attend(index, q_NHD))
        if spec.parallel_residual:
            more_NC = (
                _mlp(model, layer, operations, operations.norm(layer.mlp_norm, x_NC)) + more_NC
            )
        else:
            if layer.post_attention_norm is not None:
                more_NC = operations.norm(layer.post_attention_norm, more_NC)
            x_NC, normed_NC = operations.add_norm(layer.mlp_norm, x_NC, more_NC)
            more_NC = _mlp(model, layer, operations, normed_NC)
            if layer.post_mlp_norm is not None:
                more_NC = operations.norm(layer.post_mlp_norm, more_NC)
        if last and wanted_W is not None:
            x_NC, more_NC = x_NC.index_select(0, wanted_W), more_NC.index_select(0, wanted_W)
        following = model.final_norm if last else model.layers[index + 1].attention_norm
        x_NC, normed_NC = operations.add_norm(following, x_NC, more_NC)
    logits = model.head(normed_NC)
    if spec.final_softcap is not None:
        logits = torch.tanh(logits / spec.final_softcap) * spec.final_softcap
    return logits


def _mlp(model: Decoder, layer: Layer, operations: Operations, x_NC: torch.Tensor) -> torch.Tensor:
    inner = layer.up(x_NC)
    if model.spec.gated:
        return layer.down(operations.gate(inner))
    return layer.down(activate(model.spec.activation, inner, exact=False))
