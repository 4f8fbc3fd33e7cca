"""What a GPU knows of the rows of a step, and where it finds their blocks.

Each resident thread has one row of a block table that stays on the device and is told of new
blocks only, so that a decode step sends three numbers a row and no table.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch


class Rows(NamedTuple):
    """The rows of one step, as tensors on the device; N rows.

    Those before `decodes` are one token each of a thread of its own; the others stand in tiles.
    """

    tokens_N: torch.Tensor
    """int32; below zero: the newest token of the row's slot, which only the device knows."""
    positions_N: torch.Tensor
    """int32."""
    firsts_N: torch.Tensor
    """int32; where in `tables` the blocks of the row's thread begin."""
    tables: torch.Tensor
    """int32, all slots one after another."""
    decodes: int
    tiles: torch.Tensor | None
    """int32 (2, tiles): the first row of each tile, and how many rows it has; one thread each."""
    width: int
    """Blocks from `firsts_N` on that hold every row's context."""


class Slots:
    """Which row of the device's block table belongs to which residency.

    Invariant: after `send`, the first `known` entries of a residency's slot are its blocks (which
    only grow while it is resident), and the others are the cache's spare one; one further slot is
    nobody's, and all its blocks are the spare one.
    """

    def __init__(
        self, residents: int, blocks_each: int, *, spare: int, device: torch.device
    ) -> None:
        self.blocks_each = blocks_each
        self._spare = spare
        self.tables = torch.full(
            ((residents + 1) * blocks_each,), spare, dtype=torch.int32, device=device
        )
        self.newest = torch.zeros(residents + 1, dtype=torch.int32, device=device)
        """The token that was sampled last in each slot."""
        self.nobody = residents * blocks_each
        self._free = list(range(residents - 1, -1, -1))
        self._slots: dict[int, int] = {}
        self._known: dict[int, int] = {}
        self._filled = [0] * residents
        """Entries of each slot that are not the spare block."""
        self._where: list[int] = []
        self._what: list[int] = []

    def first(self, residency: int, blocks: Sequence[int], used: int) -> int:
        """Where the residency's blocks begin; new ones among the first `used` are noted."""
        slot = self._slots.get(residency)
        if slot is None:
            slot = self._slots[residency] = self._free.pop()
            self._known[residency] = 0
        first, known = slot * self.blocks_each, self._known[residency]
        if known < used:
            self._where.extend(range(first + known, first + used))
            self._what.extend(blocks[known:used])
            # What the one before it left there may by now be anybody's, poison included.
            left = range(first + used, first + self._filled[slot])
            self._where.extend(left)
            self._what.extend(self._spare for _ in left)
            self._known[residency] = self._filled[slot] = used
        return first

    def slots(self, residencies: Sequence[int]) -> list[int]:
        """Of residencies that have one."""
        return [self._slots[residency] for residency in residencies]

    def send(self) -> None:
        """Tell the device what was noted."""
        if self._where:
            noted = put(np.asarray([self._where, self._what], dtype=np.int64), self.tables.device)
            self.tables.index_copy_(0, noted[0], noted[1].to(torch.int32))
            self._where, self._what = [], []

    def forget(self, residency: int) -> None:
        """Free the slot; a residency that has none is ignored."""
        slot = self._slots.pop(residency, None)
        if slot is not None:
            self._free.append(slot)
            del self._known[residency]

    def filled_in(self, tokens_N: torch.Tensor, firsts_N: torch.Tensor) -> torch.Tensor:
        """The tokens, those included that only the device knows."""
        newest = self.newest.index_select(0, firsts_N // self.blocks_each)
        return torch.where(tokens_N < 0, newest, tokens_N)


def put(values: np.ndarray, device: torch.device) -> torch.Tensor:
    """On the device; the caller does not wait for the copy."""
    tensor = torch.from_numpy(values)
    if device.type != "cuda":
        return tensor
    # Pinned memory comes from torch's cache, which does not hand it out again before the copy.
    return tensor.pin_memory().to(device, non_blocking=True)
