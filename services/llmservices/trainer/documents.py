"""A micro-batch as one flat row of tokens: no padding, documents side by side.

Legend: N tokens, S sequences, H heads, D width of a head, B sequences of a group, T its longest.

Sequences are ordered by length, so that attention works on groups of (nearly) equal length: what is
padded there is little, and everything else of a model sees real tokens alone.
"""

from collections.abc import Sequence
from typing import Final

import msgspec
import torch

GROUP_WASTE: Final = 1.25
"""A group's padded tokens are at most so many times its real ones (but for tiny groups)."""
GROUP_SEQUENCES_MIN: Final = 4
"""Below this, a group's fixed cost exceeds what padding costs."""


class Group(msgspec.Struct, frozen=True):
    """Sequences that attend together."""

    start: int
    """Its first token among the N."""
    sequences: int
    longest: int
    places: torch.Tensor | None
    """int64: where each real token stands among the B x T padded ones; absent where all are
    equally long."""
    bias_B11T: torch.Tensor | None
    """0 at real keys, -inf at padding; absent as above."""
    tokens: int


class Documents(msgspec.Struct, frozen=True):
    """Sequences end to end."""

    ids_N: torch.Tensor
    positions_N: torch.Tensor
    """Of each token in its sequence."""
    types_N: torch.Tensor | None
    """Token types, where the data tells two texts of a sequence apart."""
    groups: list[Group]
    order: list[int]
    """Sequence i here was sequence order[i] of the caller."""
    firsts_S: torch.Tensor
    """Places of the sequences' first tokens."""
    lasts_S: torch.Tensor
    lengths: list[int]

    @property
    def tokens(self) -> int:
        """Real ones, all of them."""
        return int(self.ids_N.shape[0])


def _grouped(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """Ranges of sequences, sorted by length ascending, that attend together."""
    ranges: list[tuple[int, int]] = []
    first, total = 0, 0
    for index, length in enumerate(lengths):
        count = index - first
        padded = (count + 1) * length
        if count >= GROUP_SEQUENCES_MIN and padded > GROUP_WASTE * (total + length):
            ranges.append((first, index))
            first, total = index, 0
        total += length
    ranges.append((first, len(lengths)))
    return ranges


def _group(lengths: Sequence[int], start: int, device: torch.device) -> Group:
    longest, count, tokens = lengths[-1], len(lengths), sum(lengths)
    if lengths[0] == longest:
        return Group(start, count, longest, None, None, tokens)
    lengths_B = torch.tensor(lengths)
    real_BT = torch.arange(longest)[None, :] < lengths_B[:, None]
    bias = torch.zeros(count, longest).masked_fill_(~real_BT, float("-inf"))
    return Group(
        start,
        count,
        longest,
        real_BT.view(-1).nonzero().view(-1).to(device),
        bias[:, None, None, :].to(device),
        tokens,
    )


def lay_out(
    sequences: Sequence[torch.Tensor],
    types: Sequence[torch.Tensor] | None = None,
    device: torch.device | None = None,
) -> Documents:
    """Documents of int64 sequences, none of them empty; `types` are as long as these."""
    device = device or torch.device("cpu")
    order = sorted(range(len(sequences)), key=lambda index: len(sequences[index]))
    lengths = [len(sequences[index]) for index in order]
    groups: list[Group] = []
    start = 0
    for first, end in _grouped(lengths):
        groups.append(_group(lengths[first:end], start, device))
        start += groups[-1].tokens
    ends_S = torch.tensor(lengths).cumsum(0)
    return Documents(
        ids_N=torch.cat([sequences[index] for index in order]).to(device),
        positions_N=torch.cat([torch.arange(length) for length in lengths]).to(device),
        types_N=None if types is None else torch.cat([types[index] for index in order]).to(device),
        groups=groups,
        order=order,
        firsts_S=(ends_S - torch.tensor(lengths)).to(device),
        lasts_S=(ends_S - 1).to(device),
        lengths=lengths,
    )
