"""One thread while it is resident: its ids, how far it is computed, and what it has proposed."""

from typing import Final

import numpy as np
from llmproto.generation import TokenScore

from llmservices.executor.blocks import Chain
from llmservices.executor.contract import Admission, Proposal

UNKNOWN: Final = -1
"""Stands for a token that was sampled and has not left the device."""


class Resident:
    """A thread's state in the engine.

    Invariant: computed < known (there is always a row left to compute, the newest token's)
    until it has ended, its proposals are the consecutive positions after the watermark, and no
    token but the last is `UNKNOWN`, outside of a step.
    """

    __slots__ = (
        "_tokens", "admission", "age", "chain", "computed", "ended", "known", "prompt_scores",
        "proposals", "shared", "watermark",
    )  # fmt: skip

    def __init__(self, admission: Admission, *, age: int) -> None:
        self.admission = admission
        self.age = age
        self.chain = Chain(admission.domain)
        self._tokens = np.asarray(admission.tokens, dtype=np.int32)
        self.known = len(self._tokens)
        self.computed = 0
        self.watermark = self.known - 1
        self.ended = False
        self.shared = False
        """Whether a remembered prefix was looked for."""
        self.proposals: list[Proposal] = []
        self.prompt_scores: list[TokenScore] = []

    @property
    def tokens(self) -> np.ndarray:
        """All ids so far."""
        return self._tokens[: self.known]

    @property
    def scores_prompt(self) -> bool:
        """Whether log-probabilities of the prompt are still to be computed."""
        wanted = self.admission.prompt_scores
        return wanted and len(self.prompt_scores) < self.admission.prompt_tokens

    @property
    def unknown(self) -> bool:
        """Whether the last token is not known yet."""
        return bool(self._tokens[self.known - 1] == UNKNOWN)

    def learn(self, position: int, token: int) -> None:
        """A token came; one that stood as unknown so far, or a further one."""
        if position < self.known:
            assert self._tokens[position] == UNKNOWN
            self._tokens[position] = token
        else:
            self.append(token)

    def append(self, token: int) -> None:
        """Take a further token into the context."""
        if self.known == len(self._tokens):
            room = np.zeros(max(64, self.known), dtype=np.int32)
            self._tokens = np.concatenate([self._tokens, room])
        self._tokens[self.known] = token
        self.known += 1

    def commit(self, position: int) -> None:
        """Raise the watermark and forget what is under it."""
        self.watermark = max(self.watermark, position)
        self.proposals = [row for row in self.proposals if row.position > self.watermark]

    def check(self) -> None:
        """Assert the invariant."""
        assert self.ended or self.computed < self.known
        assert UNKNOWN not in self.tokens[:-1]
        positions = [row.position for row in self.proposals]
        assert positions == sorted(set(positions))
        assert all(position > self.watermark for position in positions)
        assert not self.ended or not self.chain.blocks
