"""The operations of a step with kernels of our own; what they do not know is left to torch."""

import subprocess

import torch
from triton.errors import TritonError

from llmservices.executor.attention import Cache
from llmservices.executor.gpu.graphs import on
from llmservices.executor.gpu.kernels import attention, layers
from llmservices.executor.gpu.operations import Operations
from llmservices.executor.gpu.rows import Rows
from llmservices.models.decoder import Decoder, Layer, Norm, activate

_TILE_ELEMENTS = 64
"""Rows times queries of a tile: as many as one instruction of an H100's tensor cores takes."""
_PARTS_MAX = 32
_PROGRAMS_A_CORE = 2
_ACTIVATIONS = {"silu": layers.SILU, "gelu_tanh": layers.GELU_TANH}


class KernelOperations:
    """Of one step."""

    def __init__(
        self, model: Decoder, cache: Cache, rows: Rows, *, tile_rows: int, programs: int
    ) -> None:
        """`programs` are enough to keep the whole GPU busy."""
        self._model, self._spec, self._cache, self._rows = model, model.spec, cache, rows
        self._tile_rows = tile_rows
        self._parts = _parts(rows.decodes * model.spec.kv_heads, programs)

    def norm(self, norm: Norm, x_NC: torch.Tensor) -> torch.Tensor:
        if not norm.rms:
            return norm(x_NC, exact=False)
        return layers.add_norm(x_NC.contiguous(), None, norm.weight, eps=norm.eps, wide=norm.wide)

    def add_norm(
        self, norm: Norm, x_NC: torch.Tensor, more_NC: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not norm.rms:
            x_NC = x_NC + more_NC
            return x_NC, norm(x_NC, exact=False)
        return x_NC, layers.add_norm(x_NC, more_NC, norm.weight, eps=norm.eps, wide=norm.wide)

    def store(self, index: int, layer: Layer, qkv: torch.Tensor) -> torch.Tensor:
        spec, rows, model = self._spec, self._rows, self._model
        norms, eps, wide = None, 0.0, False
        if layer.q_norm is not None and layer.k_norm is not None:
            norms = layer.q_norm.weight, layer.k_norm.weight
            eps, wide = layer.q_norm.eps, layer.q_norm.wide
        return layers.store(
            qkv,
            self._cache.layers[index],
            heads=spec.heads,
            angles=model.ropes[spec.rope_of[index]] if model.ropes else None,
            norms=norms,
            eps=eps,
            wide=wide,
            tables=rows.tables,
            positions_N=rows.positions_N,
            firsts_N=rows.firsts_N,
        )

    def attend(self, index: int, q_NHD: torch.Tensor) -> torch.Tensor:
        rows = self._rows
        out = torch.empty_like(q_NHD)
        if rows.decodes:
            alone = slice(0, rows.decodes)
            self._attention(index, q_NHD[alone], out[alone], None, self._parts)
        if rows.tiles is not None:
            self._attention(index, q_NHD, out, rows.tiles, 1)
        return out.view(len(out), -1)

    def gate(self, inner: torch.Tensor) -> torch.Tensor:
        known = _ACTIVATIONS.get(self._spec.activation)
        if known is not None:
            return layers.gate(inner, known)
        half = inner.shape[1] // 2
        return activate(self._spec.activation, inner[:, :half], exact=False) * inner[:, half:]

    def _attention(
        self,
        index: int,
        q_NHD: torch.Tensor,
        out_NHD: torch.Tensor,
        tiles: torch.Tensor | None,
        parts: int,
    ) -> None:
        spec, rows = self._spec, self._rows
        attention.attention(
            q_NHD,
            self._cache.layers[index],
            out_NHD,
            tables=rows.tables,
            positions_N=rows.positions_N,
            firsts_N=rows.firsts_N,
            tiles=tiles,
            tile_rows=self._tile_rows,
            parts=parts,
            scale=spec.attention_scale,
            softcap=spec.attention_softcap,
            window=spec.windows[index],
        )


def refusal(model: Decoder) -> str | None:
    """Why no kernel runs here; None: one did.  Triton builds what starts its kernels with the
    machine's own C compiler and Python's headers, of which either may be missing."""
    try:
        with on(model.device):
            layers.gate(torch.zeros((1, 256), dtype=model.dtype, device=model.device), layers.SILU)
    except subprocess.CalledProcessError:
        return "the C compiler failed; are Python's headers installed?"
    except (RuntimeError, OSError, TritonError) as error:
        return str(error).partition("\n")[0][:200]
    return None


class Kernels:
    """Makes them for one model on one device."""

    def __init__(self, model: Decoder) -> None:
        queries = model.spec.heads // model.spec.kv_heads
        self.tile_rows: int | None = max(1, _TILE_ELEMENTS // queries)
        self._rows = max(1, _TILE_ELEMENTS // queries)
        cores = 1
        if model.device.type == "cuda":
            cores = torch.cuda.get_device_properties(model.device).multi_processor_count
        self._programs = _PROGRAMS_A_CORE * cores

    def __call__(self, model: Decoder, cache: Cache, rows: Rows) -> Operations:
        return KernelOperations(model, cache, rows, tile_rows=self._rows, programs=self._programs)


def _parts(programs: int, wanted: int) -> int:
    """Among how many programs a row's keys are split, so that there are about as many as
    wanted."""
    parts = 1
    while parts < _PARTS_MAX and parts * programs < wanted:
        parts *= 2
    return parts
