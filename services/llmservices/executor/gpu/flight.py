"""One step between its start and its tokens."""

from collections.abc import Sequence

import torch

from llmservices.executor.gpu.sampling import Drawn, samples
from llmservices.executor.resident import Resident
from llmservices.executor.runner import Work
from llmservices.executor.sampler import Ask


class Flight:
    """What was started, for whoever takes it to its end.

    Invariant: `computed` has one number for each of `residents`; `asking`, `asks` and `picked` one
    item for each row that a token comes out of, in the order of `residents`.
    """

    def __init__(
        self, residents: list[Resident], works: Sequence[Work], logits_WV: torch.Tensor | None
    ) -> None:
        self.residents = residents
        self.works = works
        self.logits_WV = logits_WV
        """None once they were sampled on the device."""
        self.computed: list[int] = []
        """Tokens whose KV stands after it."""
        self.asking: list[Resident] = []
        self.asks: list[Ask] = []
        self.picked: list[int] = []
        """Rows of the logits."""
        self.drawn: Drawn | None = None
        """Tokens that come from the device; None: they are chosen when it lands."""

    @property
    def stays(self) -> bool:
        """Whether nothing but tokens is wanted, all of them can be sampled on the device, and no
        thread ends without one."""
        complete = sum(
            computed == resident.known
            for resident, computed in zip(self.residents, self.computed, strict=True)
        )
        return (
            0 < complete == len(self.asks)
            and all(work.wanted != "all" for work in self.works)
            and all(samples(ask.sampling) for ask in self.asks)
        )
