import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from llmservices.executor.blocks import BlockTable, Chain

BLOCK_TOKENS = 4


def ids(*values: int) -> np.ndarray:
    return np.asarray(values, dtype=np.int32)


def filled(table: BlockTable, tokens: np.ndarray, domain: bytes = b"a") -> Chain:
    chain = Chain(domain)
    table.extend(chain, len(tokens))
    table.remember(chain, tokens)
    return chain


def test_a_prefix_is_shared_in_full_blocks_only() -> None:
    table = BlockTable(8, BLOCK_TOKENS)
    first = filled(table, ids(1, 2, 3, 4, 5, 6, 7, 8, 9))
    second = Chain(b"a")
    assert table.share(second, ids(1, 2, 3, 4, 5, 6, 7, 8, 9)) == 8
    assert second.blocks == first.blocks[:2]
    third = Chain(b"a")
    assert table.share(third, ids(1, 2, 3, 4, 5, 6, 7)) == 4
    assert table.held_alone(first) == 1
    table.check([first, second, third])


def test_a_prefix_is_not_shared_across_domains_nor_in_another_place() -> None:
    table = BlockTable(8, BLOCK_TOKENS)
    first = filled(table, ids(1, 2, 3, 4, 5, 6, 7, 8))
    assert table.share(Chain(b"b"), ids(1, 2, 3, 4)) == 0
    assert table.share(Chain(b"a"), ids(5, 6, 7, 8)) == 0
    table.check([first])


def test_a_given_back_prefix_is_found_until_its_room_is_needed() -> None:
    table = BlockTable(2, BLOCK_TOKENS)
    table.give_back(filled(table, ids(1, 2, 3, 4, 5, 6, 7, 8)))
    assert table.available == 2
    again = Chain(b"a")
    assert table.share(again, ids(1, 2, 3, 4)) == 4
    table.give_back(again)
    # The end of the prefix goes before its beginning.
    other = filled(table, ids(9, 9, 9), b"b")
    found = Chain(b"a")
    assert table.share(found, ids(1, 2, 3, 4, 5, 6, 7, 8)) == 4
    table.check([other, found])


def test_a_forgotten_parent_hides_its_children_even_when_its_block_returns() -> None:
    table = BlockTable(3, BLOCK_TOKENS)
    whole = filled(table, ids(1, 2, 3, 4, 5, 6, 7, 8))
    parent = whole.blocks[0]
    keeper = Chain(b"a")
    keeper.blocks.append(whole.blocks[1])
    table._holders[whole.blocks[1]] += 1
    table.give_back(whole)
    crowd = filled(table, ids(7, 7, 7, 7, 7, 7, 7, 7), b"b")
    assert parent in crowd.blocks
    assert table.share(Chain(b"a"), ids(1, 2, 3, 4, 5, 6, 7, 8)) == 0
    table.check([crowd, keeper])


def test_discarded_blocks_are_not_found_again() -> None:
    table = BlockTable(4, BLOCK_TOKENS)
    chain = filled(table, ids(1, 2, 3, 4, 5))
    blocks = list(chain.blocks)
    assert table.discard(chain) == blocks
    assert table.share(Chain(b"a"), ids(1, 2, 3, 4)) == 0
    table.check([chain])


class Blocks(RuleBasedStateMachine):
    """Threads come, grow and go; a shared prefix always stands for the same ids."""

    def __init__(self) -> None:
        super().__init__()
        self.table = BlockTable(12, BLOCK_TOKENS)
        self.chains: list[tuple[Chain, np.ndarray]] = []
        self.content: dict[int, bytes] = {}

    @rule(
        domain=st.sampled_from([b"a", b"b"]),
        tokens=st.lists(st.integers(0, 1), min_size=1, max_size=20),
    )
    def come(self, domain: bytes, tokens: list[int]) -> None:
        chain = Chain(domain)
        wanted = ids(*tokens)
        shared = self.table.share(chain, wanted)
        for index, block in enumerate(chain.blocks):
            assert self.content[block] == domain + wanted[: (index + 1) * BLOCK_TOKENS].tobytes()
        assert shared <= len(wanted)
        if self.table.needed(chain, len(wanted)) > self.table.available:
            self.table.give_back(chain)
            return
        self.table.extend(chain, len(wanted))
        self.chains.append((chain, wanted))
        self._fill(chain, wanted)

    @precondition(lambda self: self.chains)
    @rule(which=st.integers(0, 100), token=st.integers(0, 1))
    def grow(self, which: int, token: int) -> None:
        index = which % len(self.chains)
        chain, old = self.chains[index]
        wanted = np.append(old, np.int32(token))
        if self.table.needed(chain, len(wanted)) > self.table.available:
            return
        self.table.extend(chain, len(wanted))
        self.chains[index] = (chain, wanted)
        self._fill(chain, wanted)

    @precondition(lambda self: self.chains)
    @rule(which=st.integers(0, 100), trusted=st.booleans())
    def go(self, which: int, trusted: bool) -> None:
        chain, _ = self.chains.pop(which % len(self.chains))
        if trusted:
            self.table.give_back(chain)
        else:
            self.table.discard(chain)

    def _fill(self, chain: Chain, tokens: np.ndarray) -> None:
        for index in range(len(tokens) // BLOCK_TOKENS):
            prefix = chain.domain + tokens[: (index + 1) * BLOCK_TOKENS].tobytes()
            assert index >= chain.remembered or self.content[chain.blocks[index]] == prefix
            self.content[chain.blocks[index]] = prefix
        self.table.remember(chain, tokens)

    @invariant()
    def holds(self) -> None:
        self.table.check([chain for chain, _ in self.chains])


TestBlocks = Blocks.TestCase
TestBlocks.settings = settings(deadline=None)
