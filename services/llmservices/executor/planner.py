"""What the next step contains: a pure function of the resident threads and the free blocks.

Source: chunked prefill beside decodes, Agrawal et al. 2024 (arXiv 2403.02310), section 4.
"""

from collections.abc import Iterable

import msgspec


class Candidate(msgspec.Struct, frozen=True):
    """One resident thread as the planner sees it."""

    residency: int
    service_class: int
    priority: int
    age: int
    """Smaller is older; no two are equal."""
    computed: int
    """Tokens whose KV is in its blocks."""
    known: int
    """Tokens so far; known - computed of them are to be computed.  1: a decode."""
    blocks: int
    """Blocks in its table."""
    blocks_alone: int
    """Those of them that nobody shares."""
    allowed: bool = True
    """Not ended, and not too far beyond its watermark."""
    chunk_tokens_max: int | None = None
    """The longest chunk that this thread may get, where it is bounded for its own sake."""

    @property
    def rank(self) -> tuple[int, int, int]:
        """Smaller is served first and gives back last."""
        return (self.service_class, -self.priority, self.age)


class Chunk(msgspec.Struct, frozen=True):
    """Compute the next `tokens` tokens of a thread."""

    residency: int
    start: int
    tokens: int


class Plan(msgspec.Struct, frozen=True):
    """First the residencies in `give_back` lose their blocks, then the chunks are computed,
    decodes first."""

    chunks: list[Chunk]
    give_back: list[int]
    waiting: tuple[int, int, int] | None = None
    """Rank of the best thread that could move on but for blocks.  What is given back may be
    more than was counted on, where victims shared it among themselves: nobody behind this rank
    may take it."""


def plan(
    candidates: Iterable[Candidate],
    *,
    blocks_free: int,
    block_tokens: int,
    step_tokens: int,
    beside_tokens: int | None = None,
) -> Plan:
    """Decodes, then chunks of prefills while `step_tokens` rows last, or `beside_tokens` beside
    decodes; blocks go by rank.

    A thread that lacks blocks takes them from the last in rank (the youngest of the lowest
    class), never from one before it, so the first in rank always moves on and nothing can
    livelock.  Threads that could only go on by taking from a better one wait, and keep what
    they hold.  A prefill gets at least a block's worth of rows however many decodes there are.
    """
    ranked = sorted(candidates, key=lambda candidate: candidate.rank)
    ready = [c for c in ranked if c.allowed and c.known > c.computed]
    decodes = sum(c.known - c.computed == 1 for c in ready)
    rows = step_tokens - decodes
    if decodes and beside_tokens is not None:
        rows = min(rows, beside_tokens)
    rows = max(rows, block_tokens)
    victims = [c for c in ranked if c.blocks]
    free = blocks_free
    given: list[int] = []
    waiting: tuple[int, int, int] | None = None
    gone: set[int] = set()
    decode_chunks: list[Chunk] = []
    prefill_chunks: list[Chunk] = []
    for candidate in ready:
        if candidate.residency in gone:
            continue
        pending = candidate.known - candidate.computed
        tokens = 1 if pending == 1 else min(pending, rows, candidate.chunk_tokens_max or pending)
        if tokens == 0:
            continue
        short = _short(candidate, tokens, block_tokens)
        while short > free and victims and victims[-1].rank > candidate.rank:
            victim = victims.pop()
            free += victim.blocks_alone
            given.append(victim.residency)
            gone.add(victim.residency)
        if short > free:
            room = (candidate.blocks + free) * block_tokens - candidate.computed
            if room <= 0:
                waiting = waiting or candidate.rank
                continue
            tokens = min(tokens, room)
            short = _short(candidate, tokens, block_tokens)
        free -= short
        chunk = Chunk(candidate.residency, candidate.computed, tokens)
        if pending == 1:
            decode_chunks.append(chunk)
        else:
            rows -= tokens
            prefill_chunks.append(chunk)
    return Plan(decode_chunks + prefill_chunks, given, waiting)


def _short(candidate: Candidate, tokens: int, block_tokens: int) -> int:
    return max(0, -(-(candidate.computed + tokens) // block_tokens) - candidate.blocks)
