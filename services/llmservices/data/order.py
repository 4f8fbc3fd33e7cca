"""The order of rows: a pure function of how many there are, the seed and the epoch.

`shuffled` gives the order in which `transformers.Trainer` sees its training rows, so that two runs
can be compared step by step.  Sources: PyTorch's `randperm` on a CPU (a Fisher-Yates shuffle from
the front, each draw one 32-bit number of MT19937 modulo what is left) and its `manual_seed`
(Matsumoto and Nishimura's init_genrand of the low 32 bits); accelerate's SeedableRandomSampler,
which seeds epoch e with seed + e.
"""

from typing import Final

import numpy as np
import numpy.typing as npt
from llmproto.errors import invalid

ROWS_MAX: Final = ((1 << 32) - 1) // 20
"""From here on PyTorch draws numbers of 64 bits."""
GROUP_BATCHES: Final = 50
"""Batches among whose rows those of similar length are put together."""

Int64s = npt.NDArray[np.int64]


def permutation(rows: int, seed: int) -> Int64s:
    """What `torch.randperm(rows, generator=torch.Generator().manual_seed(seed))` gives."""
    if rows >= ROWS_MAX:
        raise invalid(f"{rows} rows cannot be shuffled, at most {ROWS_MAX - 1}: give several parts")
    draws = np.random.RandomState(seed & 0xFFFFFFFF).randint(0, 1 << 32, rows, np.uint32)
    left = np.arange(rows, 0, -1, dtype=np.int64)
    chosen = (np.arange(rows) + draws.astype(np.int64) % left).tolist()
    order = list(range(rows))
    for place, other in enumerate(chosen[:-1]):
        order[place], order[other] = order[other], order[place]
    return np.array(order, np.int64)


def shuffled(rows: int, seed: int, epoch: int) -> Int64s:
    """Every row once, in the order of this epoch."""
    return permutation(rows, seed + epoch)


def grouped_by_length(order: Int64s, lengths: Int64s, *, batch: int, seed: int) -> Int64s:
    """The same rows so that those of one batch have similar lengths.

    Within each GROUP_BATCHES batches of the order rows are sorted by length, which batches then
    come in random order; a smaller last batch stays last.
    """
    span = GROUP_BATCHES * batch
    groups = [order[start : start + span] for start in range(0, len(order), span)]
    by_length = [group[np.argsort(-lengths[group], kind="stable")] for group in groups]
    sorted_rows = np.concatenate(by_length) if by_length else order
    whole = len(sorted_rows) // batch
    batches = sorted_rows[: whole * batch].reshape(whole, batch)
    return np.concatenate(
        [batches[permutation(whole, seed)].reshape(-1), sorted_rows[whole * batch :]]
    )


def window_starts(count: int, places: int, *, seed: int, index: int) -> Int64s:
    """Where the windows of batch `index` begin: uniform in 0 .. places - 1.

    Source: counter-based generation, Philox (Salmon et al. 2011); its raw stream never changes.
    """
    raw = np.random.Philox(key=[seed, index]).random_raw(count)
    return (raw % np.uint64(places)).astype(np.int64)
