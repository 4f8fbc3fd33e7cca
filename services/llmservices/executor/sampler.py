"""From logits to the next token: penalties, bias, filters, and randomness that is counted
instead of drawn.

The random number of token t at position i is a function of (seed, i, t) alone, so it does not
matter who runs beside a thread, or where it was before.  Source: Gumbel-max, Maddison et al.
2014 (arXiv 1411.0030); the integer mixer is the finaliser of MurmurHash3.

Legend: W rows, V vocabulary.
"""

import math
from collections.abc import Sequence
from typing import Protocol

import msgspec
import numpy as np
import torch
from llmproto.errors import ErrorKind, RemoteError
from llmproto.generation import Sampling, TokenScore
from torch.nn import functional

from llmservices.models.decoder import elementwise

_MASK_64 = (1 << 64) - 1
_MASK_32 = (1 << 32) - 1
_ONE_BELOW = 1.0 - 2.0**-24
_ELEMENTS_AT_ONCE = 1 << 16
"""Large vocabularies are drawn from a few rows at a time, so that what is computed stays in the
core's cache."""


class Ask(msgspec.Struct, frozen=True):
    """What one row of logits is for."""

    sampling: Sampling
    tokens: np.ndarray
    """All ids before the position that is chosen."""
    prompt_tokens: int

    @property
    def position(self) -> int:
        return len(self.tokens)


class Choice(msgspec.Struct, frozen=True):
    """The chosen token, with its log-probability where that was asked for."""

    token: int
    score: TokenScore | None


class Draw(msgspec.Struct, frozen=True):
    """A row of logits, after penalties and bias, from which a token is to be drawn."""

    logits_V: torch.Tensor
    sampling: Sampling
    words: tuple[int, int]
    """That its noise comes from."""


class Drawer(Protocol):
    """Draws fast where it is sure."""

    def draw(self, draws: Sequence[Draw]) -> list[int | None]:
        """The tokens that this module's rule gives; None where that is to be asked."""


class Sampler:
    """Chooses tokens for any number of rows at once; a row's choice does not depend on the
    other rows."""

    def __init__(
        self, vocab_tokens: int, device: torch.device, drawer: Drawer | None = None
    ) -> None:
        # Mixed once here, so that a row costs a single further round.
        self._mixed_V = mixed_ids(vocab_tokens, device)
        self._drawer = drawer

    def choose(
        self,
        logits_WV: torch.Tensor,
        asks: Sequence[Ask],
        greatest: tuple[list[float], list[int]] | None = None,
    ) -> list[Choice | RemoteError]:
        """One choice a row; INTERNAL for a row whose logits are not numbers.

        `greatest` logits and the first tokens that have them, where they are known.
        """
        top_W, best = _greatest(logits_WV) if greatest is None else greatest
        plain = {row for row, ask in enumerate(asks) if _plain(ask.sampling)}
        chosen: list[Choice | RemoteError | None] = [None] * len(asks)
        for row, ask in enumerate(asks):
            if not math.isfinite(top_W[row]):
                chosen[row] = RemoteError(
                    ErrorKind.INTERNAL,
                    f"the model's greatest logit at position {ask.position} is {top_W[row]}",
                )
        for row in plain:
            if chosen[row] is None and not asks[row].sampling.temperature:
                chosen[row] = Choice(best[row], None)
        left = [row for row, choice in enumerate(chosen) if choice is None]
        adjusted = {
            row: logits_WV[row] if row in plain else adjust(logits_WV[row].float(), asks[row])
            for row in left
        }
        tokens = self._drawn(adjusted, asks)
        drawn = [row for row in left if row in plain and tokens[row] is None]
        for row, token in zip(drawn, self._draw(logits_WV, asks, drawn), strict=True):
            tokens[row] = token
        for row in left:
            chosen[row] = self._choose(adjusted[row], asks[row], tokens[row])
        assert None not in chosen
        return [choice for choice in chosen if choice is not None]

    def _drawn(
        self, adjusted: dict[int, torch.Tensor], asks: Sequence[Ask]
    ) -> dict[int, int | None]:
        """What the drawer is sure of."""
        rows = [row for row in adjusted if asks[row].sampling.temperature]
        tokens: dict[int, int | None] = dict.fromkeys(adjusted)
        if self._drawer is not None and rows:
            draws = [
                Draw(
                    adjusted[row],
                    asks[row].sampling,
                    key(asks[row].sampling.seed, asks[row].position),
                )
                for row in rows
            ]
            tokens.update(zip(rows, self._drawer.draw(draws), strict=True))
        return tokens

    def _draw(self, logits_WV: torch.Tensor, asks: Sequence[Ask], rows: Sequence[int]) -> list[int]:
        """Sample rows that need nothing but a temperature."""
        drawn: list[int] = []
        at_once = max(1, _ELEMENTS_AT_ONCE // logits_WV.shape[-1])
        for start in range(0, len(rows), at_once):
            some = rows[start : start + at_once]
            keys = [key(asks[row].sampling.seed, asks[row].position) for row in some]
            temperatures = torch.tensor([asks[row].sampling.temperature for row in some])
            # `copy`: float32 logits would otherwise be divided where they stand.
            logits = logits_WV[some].to(torch.float32, copy=True)
            logits /= temperatures[:, None].to(logits.device)
            logits += gumbel(self._mixed_V, keys)
            drawn += logits.max(-1).indices.tolist()
        return drawn

    def _choose(self, logits_V: torch.Tensor, ask: Ask, token: int | None) -> Choice:
        """Of logits after penalties and bias, where the token is known or not."""
        sampling = ask.sampling
        if token is not None:
            pass
        elif sampling.temperature == 0:
            token = int(logits_V.max(-1).indices)
        else:
            ids, scaled = keep(logits_V / sampling.temperature, sampling)
            noise = gumbel(self._mixed_V[ids], [key(sampling.seed, ask.position)])[0]
            token = int(ids[(scaled + noise).max(-1).indices])
        wanted = sampling.logprobs
        return Choice(token, None if wanted is None else score(logits_V, token, wanted))


def _greatest(logits_WV: torch.Tensor) -> tuple[list[float], list[int]]:
    # Several times as fast as argmax, in half precision above all; the first of equals too.
    found = logits_WV.max(-1)
    return found.values.tolist(), found.indices.tolist()


def _plain(sampling: Sampling) -> bool:
    return (
        sampling.logprobs is None
        and not adjusts(sampling)
        and (
            sampling.temperature == 0
            or (sampling.top_k == 0 and sampling.top_p >= 1.0 and sampling.min_p == 0.0)
        )
    )


def adjusts(sampling: Sampling) -> bool:
    """Whether logits are changed before anything is chosen."""
    return bool(sampling.bias_tokens) or _penalised(sampling)


def _penalised(sampling: Sampling) -> bool:
    return (
        sampling.repetition_penalty != 1.0
        or sampling.presence_penalty != 0.0
        or sampling.frequency_penalty != 0.0
    )


def adjust(logits_V: torch.Tensor, ask: Ask) -> torch.Tensor:
    """Penalties, then bias; a new tensor where anything changes.  Ids beyond the vocabulary
    have no logit."""
    sampling = ask.sampling
    if not adjusts(sampling):
        return logits_V
    # With room behind, that a drawer may read whole vectors.
    copy = logits_V.new_zeros(len(logits_V) + -len(logits_V) % 16)[: len(logits_V)]
    logits_V = copy.copy_(logits_V)
    device = logits_V.device
    if sampling.repetition_penalty != 1.0:
        seen = torch.from_numpy(np.unique(ask.tokens).astype(np.int64)).to(device)
        old = logits_V[seen]
        penalty = sampling.repetition_penalty
        logits_V[seen] = torch.where(old > 0, old / penalty, old * penalty)
    if sampling.presence_penalty or sampling.frequency_penalty:
        ids, counts = np.unique(ask.tokens[ask.prompt_tokens :], return_counts=True)
        cost = sampling.presence_penalty + sampling.frequency_penalty * counts
        where = torch.from_numpy(ids.astype(np.int64)).to(device)
        logits_V[where] -= torch.from_numpy(cost.astype(np.float32)).to(device)
    for token, bias in zip(sampling.bias_tokens, sampling.bias_values, strict=True):
        if token < len(logits_V):
            logits_V[token] += bias
    return logits_V


def keep(scaled_V: torch.Tensor, sampling: Sampling) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, ascending, and their values) that top-k, then top-p, then min-p leave; at least one."""
    ids = torch.arange(len(scaled_V), device=scaled_V.device)
    values = scaled_V
    if 0 < sampling.top_k < len(values):
        least = values.topk(sampling.top_k).values[-1]
        ids, values = _where(values >= least, ids, values)
        order = values.sort(descending=True, stable=True).indices[: sampling.top_k]
        ids, values = _at(order.sort().values, ids, values)
    if sampling.top_p < 1.0:
        chances = functional.softmax(values.double(), 0)
        # Tokens below this cannot all together reach what the nucleus leaves out: no need to
        # sort them.
        likely = chances >= (1.0 - sampling.top_p) / len(values) * 0.5
        ids, values = _where(likely, ids, values)
        ranked, order = chances[likely].sort(descending=True, stable=True)
        before = ranked.cumsum(0) - ranked
        kept = before < sampling.top_p
        kept[0] = True
        ids, values = _at(order[kept].sort().values, ids, values)
    if sampling.min_p > 0.0:
        ids, values = _where(values >= values.max() + math.log(sampling.min_p), ids, values)
    return ids, values


def _where(mask: torch.Tensor, *tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    first, second = (tensor[mask] for tensor in tensors)
    return first, second


def _at(index: torch.Tensor, *tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    first, second = (tensor[index] for tensor in tensors)
    return first, second


def score(logits_V: torch.Tensor, token: int, alternatives: int) -> TokenScore:
    """Log-probability of a token, and the most likely ones."""
    logprobs_V = functional.log_softmax(logits_V.float(), -1)
    top = logprobs_V.topk(min(alternatives, len(logprobs_V)))
    ranked = sorted(zip((-top.values).tolist(), top.indices.tolist(), strict=True))
    return TokenScore(
        token, float(logprobs_V[token]), [id_ for _, id_ in ranked], [-value for value, _ in ranked]
    )


def key(seed: int, position: int) -> tuple[int, int]:
    """Two words of 32 bits for a position of a seeded thread.  Source: SplitMix64, Steele et
    al. 2014."""
    word = _split(_split(seed & _MASK_64) + position)
    return word & _MASK_32, word >> 32


def _split(word: int) -> int:
    word = (word + 0x9E3779B97F4A7C15) & _MASK_64
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & _MASK_64
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _MASK_64
    return word ^ (word >> 31)


def mixed_ids(vocab_tokens: int, device: torch.device) -> torch.Tensor:
    """What tokens bring to their noise."""
    ids = torch.arange(vocab_tokens, dtype=torch.int64)
    return mix(_signed(ids * 0x9E3779B1)).to(device)


def _signed(word: torch.Tensor) -> torch.Tensor:
    """The low 32 bits as int32."""
    return (((word + 0x80000000) & _MASK_32) - 0x80000000).to(torch.int32)


def mix(word: torch.Tensor) -> torch.Tensor:
    """Every bit of an int32 depends on every other; one to one."""
    word, shifted = word.clone(), torch.empty_like(word)
    for shift, factor in ((16, -0x7A143595), (13, -0x3D4D51CB), (16, 1)):  # 0x85EBCA6B, 0xC2B2AE35
        torch.bitwise_right_shift(word, shift, out=shifted)
        shifted &= (1 << (32 - shift)) - 1
        word ^= shifted
        word *= factor
    return word


def gumbel(mixed: torch.Tensor, keys: Sequence[tuple[int, int]]) -> torch.Tensor:
    """Gumbel noise, float32, (len(keys), len(mixed)): the same bits for a key and a token in
    any company."""
    return noise(mixed, torch.tensor(keys, dtype=torch.int64, device=mixed.device))


def noise(mixed: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    """The same of keys that are a tensor (keys, 2) already."""
    first, second = _signed(words[:, :1]), _signed(words[:, 1:]) | 1
    bits = mix((mixed ^ first) * second) ^ -(1 << 31)
    # Unsigned, 0.5 added: never zero, and with full relative precision where it is small, where
    # the winners are.
    uniform = bits.float()
    uniform += torch.where(bits < 0, 2.0**32, 0.5)
    uniform *= 2.0**-32
    return elementwise(_to_gumbel, uniform.clamp_(max=_ONE_BELOW), exact=True)


def _to_gumbel(uniform: torch.Tensor) -> torch.Tensor:
    return uniform.neg().log1p_().neg_().log_().neg_()
