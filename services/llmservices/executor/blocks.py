"""Who holds which KV block, and which full blocks are remembered for their prefix.

Knows token ids, not tensors.  A block is free (content worthless), held by one or more threads,
or cached: held by nobody, but full and findable by its prefix until somebody needs the room.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import NewType

import numpy as np

BlockId = NewType("BlockId", int)
Serial = NewType("Serial", int)
"""Names one remembered prefix; never used twice, so a forgotten parent cannot be taken for
another."""

_PrefixKey = tuple[Serial | bytes, bytes]
"""(the prefix before it, or the cache domain for a first block; the ids inside the block)."""


class Chain:
    """One thread's blocks, in order, and how far they are remembered as a prefix.

    Invariant: `blocks[:remembered]` are full; `tail` names the prefix that they are together
    (the domain at first).
    """

    __slots__ = ("blocks", "domain", "remembered", "tail")

    def __init__(self, domain: bytes) -> None:
        self.domain = domain
        self.blocks: list[BlockId] = []
        self.remembered = 0
        self.tail: Serial | bytes = domain


class BlockTable:
    """Blocks 0..total-1, each free, cached or held.

    Invariant: free + cached + held == total, no block is in two of them, and a block's holders
    are the chains that list it.  Only full blocks are shared, so nobody ever writes to a block
    that somebody else reads. A prefix is found by comparing its ids themselves, block after
    block, never by a hash of them alone. Source: paged KV cache, Kwon et al. 2023 (arXiv
    2309.06180), section 4; prefix tree, Zheng et al. 2023 (arXiv 2312.07104), section 3.
    """

    def __init__(self, total: int, block_tokens: int) -> None:
        self.total = total
        self.block_tokens = block_tokens
        self._free = [BlockId(i) for i in range(total - 1, -1, -1)]
        self._holders = [0] * total
        self._cached: OrderedDict[BlockId, None] = OrderedDict()
        self._by_prefix: dict[_PrefixKey, tuple[BlockId, Serial]] = {}
        self._prefix_of: dict[BlockId, _PrefixKey] = {}
        self._serials = 0

    @property
    def available(self) -> int:
        """Blocks that `extend` can hand out: free and cached ones."""
        return len(self._free) + len(self._cached)

    def needed(self, chain: Chain, tokens: int) -> int:
        """Further blocks that the chain needs before it holds `tokens`."""
        return max(0, -(-tokens // self.block_tokens) - len(chain.blocks))

    def held_alone(self, chain: Chain) -> int:
        """Blocks that become available when the chain is given back."""
        return sum(self._holders[block] == 1 for block in chain.blocks)

    def share(self, chain: Chain, ids: np.ndarray) -> int:
        """Give an empty chain the longest remembered prefix of `ids`, full blocks only; returns
        its tokens."""
        assert not chain.blocks
        for start in range(0, len(ids) - self.block_tokens + 1, self.block_tokens):
            found = self._by_prefix.get((chain.tail, self._key(ids, start)))
            if found is None:
                break
            block, chain.tail = found
            self._hold(block)
            chain.blocks.append(block)
        chain.remembered = len(chain.blocks)
        return chain.remembered * self.block_tokens

    def extend(self, chain: Chain, tokens: int) -> None:
        """Make room for `tokens`; the caller has compared `needed` with `available`."""
        for _ in range(self.needed(chain, tokens)):
            if not self._free:
                self._forget_oldest()
            block = self._free.pop()
            self._holders[block] = 1
            chain.blocks.append(block)

    def remember(self, chain: Chain, ids: np.ndarray) -> None:
        """Make every block that `ids` (what the chain has computed) fills findable by its
        prefix."""
        for index in range(chain.remembered, len(ids) // self.block_tokens):
            key = (chain.tail, self._key(ids, index * self.block_tokens))
            found = self._by_prefix.get(key)
            if found is None:
                self._serials += 1
                found = (chain.blocks[index], Serial(self._serials))
                self._by_prefix[key] = found
                self._prefix_of[chain.blocks[index]] = key
            # Where another block holds the same prefix already, ours stays private and goes
            # free in the end.
            chain.tail = found[1]
            chain.remembered = index + 1

    def give_back(self, chain: Chain) -> None:
        """Let go of every block; remembered ones stay findable, the end of a prefix goes before
        its beginning."""
        for block in reversed(chain.blocks):
            self._holders[block] -= 1
            if self._holders[block]:
                continue
            if block in self._prefix_of:
                self._cached[block] = None
            else:
                self._free.append(block)
        chain.blocks = []
        chain.remembered = 0
        chain.tail = chain.domain

    def discard(self, chain: Chain) -> list[BlockId]:
        """Give back, and forget what nobody shares: its content is not to be trusted.  Returns
        those blocks."""
        alone = [block for block in chain.blocks if self._holders[block] == 1]
        for block in alone:
            prefix = self._prefix_of.pop(block, None)
            if prefix is not None:
                del self._by_prefix[prefix]
        self.give_back(chain)
        return alone

    def check(self, chains: Sequence[Chain]) -> None:
        """Assert the invariant; `chains` are all that exist."""
        holders = [0] * self.total
        for chain in chains:
            assert chain.remembered <= len(chain.blocks)
            assert len(set(chain.blocks)) == len(chain.blocks)
            for block in chain.blocks:
                holders[block] += 1
        assert holders == self._holders
        held = {block for block in range(self.total) if holders[block]}
        assert len(self._free) == len(set(self._free))
        assert not held & set(self._free)
        assert not held & set(self._cached)
        assert not set(self._free) & set(self._cached)
        assert len(held) + self.available == self.total
        assert set(self._cached) <= set(self._prefix_of)
        assert len(self._by_prefix) == len(self._prefix_of)
        for block, key in self._prefix_of.items():
            assert self._by_prefix[key][0] == block

    def _key(self, ids: np.ndarray, start: int) -> bytes:
        return ids[start : start + self.block_tokens].tobytes()

    def _hold(self, block: BlockId) -> None:
        if not self._holders[block]:
            del self._cached[block]
        self._holders[block] += 1

    def _forget_oldest(self) -> None:
        block, _ = self._cached.popitem(last=False)
        del self._by_prefix[self._prefix_of.pop(block)]
        self._free.append(block)
