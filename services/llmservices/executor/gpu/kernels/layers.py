"""What a layer does between its matrix products, each thing in one pass over memory.

All arithmetic is in float32 and rounded once, where it is stored; norms are rounded before the
weight where the model's own code does so.  Legend: C columns of a row, D dimensions of a head.
"""

import torch
import triton
import triton.language as tl

SILU = 0
GELU_TANH = 1


@triton.jit
def _add_norm(
    x,
    more,
    weight,
    out,
    columns,
    eps,
    ADDED: tl.constexpr,
    WIDE: tl.constexpr,
    C: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    at_C = tl.arange(0, C)
    inside_C = at_C < columns
    here_C = row * columns + at_C
    x_C = tl.load(x + here_C, mask=inside_C, other=0.0)
    kind = x_C.dtype
    if ADDED:
        added_C = x_C.to(tl.float32) + tl.load(more + here_C, mask=inside_C, other=0.0).to(
            tl.float32
        )
        x_C = added_C.to(kind)
        tl.store(x + here_C, x_C, mask=inside_C)
    wide_C = x_C.to(tl.float32)
    wide_C = wide_C / tl.sqrt(tl.sum(wide_C * wide_C, 0) / columns + eps)
    weight_C = tl.load(weight + at_C, mask=inside_C, other=0.0).to(tl.float32)
    if not WIDE:
        wide_C = wide_C.to(kind).to(tl.float32)
    tl.store(out + here_C, (wide_C * weight_C).to(kind), mask=inside_C)


@triton.jit
def _store(
    qkv,
    q,
    cache,
    cosines,
    sines,
    q_weight,
    k_weight,
    tables,
    positions,
    firsts,
    eps,
    NORMED: tl.constexpr,
    WIDE: tl.constexpr,
    TURNED: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIMS: tl.constexpr,
    BLOCK: tl.constexpr,
    D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    dims = tl.arange(0, D)
    inside_D = dims < DIMS
    source = qkv + (row * (HEADS + 2 * KV_HEADS) + head) * DIMS
    x_D = tl.load(source + dims, mask=inside_D, other=0.0)
    kind = x_D.dtype
    position = tl.load(positions + row)
    if head < HEADS + KV_HEADS:
        turned_D = dims < TURNED
        # The dimension that each is rotated with: half of the turned ones away.
        other_D = tl.where(dims < TURNED // 2, dims + TURNED // 2, dims - TURNED // 2)
        other_D = tl.where(turned_D, other_D, dims)
        y_D = tl.load(source + other_D, mask=inside_D, other=0.0).to(tl.float32)
        x_D = x_D.to(tl.float32)
        if NORMED:
            root = tl.sqrt(tl.sum(x_D * x_D, 0) / DIMS + eps)
            weight = q_weight if head < HEADS else k_weight
            w_D = tl.load(weight + dims, mask=inside_D, other=0.0).to(tl.float32)
            v_D = tl.load(weight + other_D, mask=inside_D, other=0.0).to(tl.float32)
            x_D, y_D = x_D / root, y_D / root
            if not WIDE:
                x_D, y_D = x_D.to(kind).to(tl.float32), y_D.to(kind).to(tl.float32)
            x_D, y_D = (x_D * w_D).to(kind).to(tl.float32), (y_D * v_D).to(kind).to(tl.float32)
        if TURNED:
            angle_D = position.to(tl.int64) * TURNED + dims
            cos_D = tl.load(cosines + angle_D, mask=turned_D, other=1.0).to(tl.float32)
            sin_D = tl.load(sines + angle_D, mask=turned_D, other=0.0).to(tl.float32)
            x_D = x_D * cos_D + y_D * sin_D
        x_D = x_D.to(kind)
    if head < HEADS:
        tl.store(q + (row * HEADS + head) * DIMS + dims, x_D, mask=inside_D)
    else:
        block = tl.load(tables + tl.load(firsts + row) + position // BLOCK).to(tl.int64)
        # Keys of all heads, then values of all heads.
        slot = (block * 2 * KV_HEADS + head - HEADS) * BLOCK + position % BLOCK
        tl.store(cache + slot * DIMS + dims, x_D, mask=inside_D)


@triton.jit
def _gate(inner, out, columns, ACTIVATION: tl.constexpr, C: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at_C = tl.program_id(1) * C + tl.arange(0, C)
    inside_C = at_C < columns
    source = inner + row * 2 * columns + at_C
    gate_C = tl.load(source, mask=inside_C, other=0.0)
    up_C = tl.load(source + columns, mask=inside_C, other=0.0)
    x_C = gate_C.to(tl.float32)
    argument_C = x_C
    if ACTIVATION == 1:
        # gelu by tanh is x times the logistic function of twice tanh's argument.
        argument_C = 1.5957691216057308 * (x_C + 0.044715 * x_C * x_C * x_C)
    y_C = x_C / (1.0 + tl.exp(-argument_C))
    tl.store(
        out + row * columns + at_C, (y_C * up_C.to(tl.float32)).to(gate_C.dtype), mask=inside_C
    )


def add_norm(
    x_NC: torch.Tensor,
    more_NC: torch.Tensor | None,
    weight_C: torch.Tensor,
    *,
    eps: float,
    wide: bool,
) -> torch.Tensor:
    """The RMS norm of x + more, which is written over x; of x where there is no more."""
    rows, columns = x_NC.shape
    out = torch.empty_like(x_NC)
    _add_norm[(rows,)](
        x_NC,
        x_NC if more_NC is None else more_NC,
        weight_C,
        out,
        columns,
        eps,
        ADDED=more_NC is not None,
        WIDE=wide,
        C=triton.next_power_of_2(columns),
        num_warps=8 if columns > 2048 else 4,
        enable_fp_fusion=True,
    )
    return out


def store(
    qkv: torch.Tensor,
    cache: torch.Tensor,
    *,
    heads: int,
    angles: tuple[torch.Tensor, torch.Tensor] | None,
    norms: tuple[torch.Tensor, torch.Tensor] | None,
    eps: float,
    wide: bool,
    tables: torch.Tensor,
    positions_N: torch.Tensor,
    firsts_N: torch.Tensor,
) -> torch.Tensor:
    """Norms and rotates queries and keys, puts keys and values into the cache; the queries
    (N, H, D)."""
    kv_heads, block, dims = cache.shape[2], cache.shape[3], cache.shape[4]
    rows = len(qkv)
    q = torch.empty((rows, heads, dims), dtype=qkv.dtype, device=qkv.device)
    _store[(rows, heads + 2 * kv_heads)](
        qkv,
        q,
        cache,
        qkv if angles is None else angles[0],
        qkv if angles is None else angles[1],
        qkv if norms is None else norms[0],
        qkv if norms is None else norms[1],
        tables,
        positions_N,
        firsts_N,
        eps,
        NORMED=norms is not None,
        WIDE=wide,
        TURNED=0 if angles is None else angles[0].shape[1],
        HEADS=heads,
        KV_HEADS=kv_heads,
        DIMS=dims,
        BLOCK=block,
        D=triton.next_power_of_2(dims),
        num_warps=1,
        enable_fp_fusion=True,
    )
    return q


def gate(inner: torch.Tensor, activation: int) -> torch.Tensor:
    """`activation` (SILU or GELU_TANH) of the first half times the second."""
    rows, columns = inner.shape[0], inner.shape[1] // 2
    out = torch.empty((rows, columns), dtype=inner.dtype, device=inner.device)
    size = min(1024, triton.next_power_of_2(columns))
    _gate[(rows, triton.cdiv(columns, size))](
        inner,
        out,
        columns,
        ACTIVATION=activation,
        C=size,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return out
