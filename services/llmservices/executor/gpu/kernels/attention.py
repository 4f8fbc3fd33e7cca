"""Attention over paged keys and values, read where they lie: no context is gathered first.

A program takes the rows of one tile (one row in a decode; a run of rows of one thread otherwise),
all the queries that share one key-value head, and a part of the keys.  Where a row's keys are split
among programs, each leaves its part with its greatest score and its mass, and `_join` puts the
parts together.

Source: online softmax and tiling, Dao 2023 (arXiv 2307.08691), section 3; keys split among
programs, Dao et al. 2023 ("Flash-Decoding"); paged keys and values, Kwon et al. 2023
(arXiv 2309.06180), section 4.1.

The cache is (blocks, 2, G, T, D).  Legend: M rows times queries of one tile, K keys of a tile, D
dimensions (a power of two), S parts.
"""

import torch
import triton
import triton.language as tl


@triton.jit(do_not_specialize=["tile_count"])
def _attend(
    q,
    cache,
    tables,
    positions,
    firsts,
    tiles,
    out,
    part,
    greatest,
    mass,
    scale,
    softcap,
    window,
    tile_count,
    CAPPED: tl.constexpr,
    WINDOWED: tl.constexpr,
    TILED: tl.constexpr,
    HEADS: tl.constexpr,
    QUERIES: tl.constexpr,
    DIMS: tl.constexpr,
    BLOCK: tl.constexpr,
    M: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    S: tl.constexpr,
    PRECISION: tl.constexpr,
):
    head = tl.program_id(1)
    split = tl.program_id(2)
    if TILED:
        row = tl.load(tiles + tl.program_id(0))
        rows = tl.load(tiles + tile_count + tl.program_id(0))
    else:
        row = tl.program_id(0)
        rows = 1
    start = tl.load(positions + row)
    table = tables + tl.load(firsts + row)

    at = tl.arange(0, M)
    row_M = at // QUERIES
    there_M = row_M < rows
    position_M = start + row_M
    dims = tl.arange(0, D)
    inside_D = dims < DIMS
    # Queries (N, G, QUERIES, DIMS): the row's, then the head's, then the query's.
    query_M = ((row + row_M).to(tl.int64) * HEADS + head) * QUERIES + at % QUERIES
    at_MD = query_M[:, None] * DIMS + dims[None, :]
    there_MD = there_M[:, None] & inside_D[None, :]
    q_MD = tl.load(q + at_MD, mask=there_MD, other=0.0)

    end = start + rows
    begin = 0
    if WINDOWED:
        begin = tl.maximum(start - window + 1, 0) // K * K
    span = tl.cdiv(tl.cdiv(end - begin, K), S) * K
    low = begin + split * span
    high = tl.minimum(low + span, end)

    top_M = tl.full([M], float("-inf"), tl.float32)
    mass_M = tl.zeros([M], tl.float32)
    sum_MD = tl.zeros([M, D], tl.float32)
    for first in range(low, high, K):
        key_K = first + tl.arange(0, K)
        exists_K = key_K < high
        block_K = tl.load(table + key_K // BLOCK, mask=exists_K, other=0).to(tl.int64)
        at_K = ((block_K * 2 * HEADS + head) * BLOCK + key_K % BLOCK) * DIMS
        at_KD = at_K[:, None] + dims[None, :]
        there_KD = exists_K[:, None] & inside_D[None, :]
        k_KD = tl.load(cache + at_KD, mask=there_KD, other=0.0)
        v_KD = tl.load(cache + at_KD + HEADS * BLOCK * DIMS, mask=there_KD, other=0.0)
        score_MK = tl.dot(q_MD, tl.trans(k_KD), input_precision=PRECISION) * scale
        if CAPPED:
            # tanh by way of the exponential, whose argument is never positive here.
            ratio_MK = score_MK / softcap
            small_MK = tl.exp(-2.0 * tl.abs(ratio_MK))
            tanh_MK = (1.0 - small_MK) / (1.0 + small_MK)
            score_MK = softcap * tl.where(ratio_MK < 0, -tanh_MK, tanh_MK)
        seen_MK = (key_K[None, :] <= position_M[:, None]) & exists_K[None, :]
        if WINDOWED:
            seen_MK = seen_MK & (key_K[None, :] > position_M[:, None] - window)
        score_MK = tl.where(seen_MK, score_MK, float("-inf"))
        now_M = tl.maximum(top_M, tl.max(score_MK, 1))
        # A row that has seen nothing yet has no greatest score to subtract.
        base_M = tl.where(now_M == float("-inf"), 0.0, now_M)
        weight_MK = tl.exp(score_MK - base_M[:, None])
        keep_M = tl.exp(top_M - base_M)
        mass_M = mass_M * keep_M + tl.sum(weight_MK, 1)
        sum_MD = sum_MD * keep_M[:, None] + tl.dot(
            weight_MK.to(v_KD.dtype), v_KD, input_precision=PRECISION
        )
        top_M = now_M

    if S == 1:
        # Every row sees its own key; rows that are not there are not stored.
        whole_M = tl.where(there_M, mass_M, 1.0)
        tl.store(out + at_MD, (sum_MD / whole_M[:, None]).to(out.dtype.element_ty), mask=there_MD)
    else:
        slot_M = query_M * S + split
        tl.store(greatest + slot_M, top_M, mask=there_M)
        tl.store(mass + slot_M, mass_M, mask=there_M)
        tl.store(part + slot_M[:, None] * DIMS + dims[None, :], sum_MD, mask=there_MD)


@triton.jit
def _join(
    out,
    part,
    greatest,
    mass,
    DIMS: tl.constexpr,
    D: tl.constexpr,
    S: tl.constexpr,
):
    query = tl.program_id(0).to(tl.int64)
    dims = tl.arange(0, D)
    inside_D = dims < DIMS
    slot_S = query * S + tl.arange(0, S)
    top_S = tl.load(greatest + slot_S)
    weight_S = tl.exp(top_S - tl.max(top_S, 0))
    whole = tl.sum(weight_S * tl.load(mass + slot_S), 0)
    part_SD = tl.load(
        part + slot_S[:, None] * DIMS + dims[None, :], mask=inside_D[None, :], other=0.0
    )
    sum_D = tl.sum(part_SD * weight_S[:, None], 0)
    tl.store(out + query * DIMS + dims, (sum_D / whole).to(out.dtype.element_ty), mask=inside_D)


def attention(
    q_NHD: torch.Tensor,
    cache: torch.Tensor,
    out_NHD: torch.Tensor,
    *,
    tables: torch.Tensor,
    positions_N: torch.Tensor,
    firsts_N: torch.Tensor,
    tiles: torch.Tensor | None,
    tile_rows: int,
    parts: int,
    scale: float,
    softcap: float | None,
    window: int | None,
) -> None:
    """Attend with the rows of `tiles`, or with every row by itself where there are none.

    `parts`, a power of two: among how many programs a row's keys are split.  All tensors are
    contiguous; all but `out_NHD` are left as they are.
    """
    heads, block, dims = cache.shape[2], cache.shape[3], cache.shape[4]
    rows, queries = q_NHD.shape[0], q_NHD.shape[1] // heads
    taken = 1 if tiles is None else tile_rows
    count = rows if tiles is None else tiles.shape[1]
    held = rows * heads * queries * parts if parts > 1 else 0
    device = q_NHD.device
    part = torch.empty(max(1, held * dims), dtype=torch.float32, device=device)
    sums = torch.empty((2, max(1, held)), dtype=torch.float32, device=device)
    _attend[(count, heads, parts)](
        q_NHD,
        cache,
        tables,
        positions_N,
        firsts_N,
        positions_N if tiles is None else tiles,
        out_NHD,
        part,
        sums[0],
        sums[1],
        scale,
        softcap or 1.0,
        window or 0,
        count,
        CAPPED=softcap is not None,
        WINDOWED=window is not None,
        TILED=tiles is not None,
        HEADS=heads,
        QUERIES=queries,
        DIMS=dims,
        BLOCK=block,
        M=max(16, triton.next_power_of_2(taken * queries)),
        K=64 if dims <= 128 else 32,
        D=max(16, triton.next_power_of_2(dims)),
        S=parts,
        PRECISION="ieee",
        num_warps=4 if tiles is None else 8,
        num_stages=2,
        enable_fp_fusion=True,
    )
    if parts > 1:
        _join[(rows * heads * queries,)](
            out_NHD,
            part,
            sums[0],
            sums[1],
            DIMS=dims,
            D=max(16, triton.next_power_of_2(dims)),
            S=parts,
            num_warps=2,
            enable_fp_fusion=True,
        )
