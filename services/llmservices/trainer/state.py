"""What a checkpoint holds beside tensors: counters, contract, early stopping, and every loss."""

import math
from collections.abc import Sequence
from typing import Final

import msgspec
import torch
from llmproto.errors import invalid
from llmproto.jobs import StepReport

from llmservices.trainer.core import Progress, Training
from llmservices.trainer.numerics import Contract
from llmservices.trainer.savebuffer import Groups

STATE: Final = "state.json"
LOSSES: Final = "losses.safetensors"
OPTIMIZER: Final = "optimizer.safetensors"
RNG: Final = "rng.torch"
BEST: Final = "best/"
"""Weights of the best validated step stand in the optimiser's file, behind this."""
COLUMNS: Final = ("step", "loss", "tokens", "learning_rate", "gradient_norm")
"""No times: two runs of one recipe make one version."""


class State(msgspec.Struct, frozen=True):
    """state.json"""

    progress: Progress
    contract: Contract
    steps_total: int
    checkpoint_every: int
    plan: str
    """Digest of the data's plan, hexadecimal: the batches are the same ones."""
    seed: int
    validations: dict[int, dict[str, float]] = {}
    """By step."""


def encode(state: State) -> bytes:
    return msgspec.json.format(msgspec.json.encode(state), indent=1)


def decode(content: bytes, where: str) -> State:
    try:
        return msgspec.json.decode(content, type=State)
    except msgspec.DecodeError as error:
        raise invalid(f"{where}: {STATE} cannot be read: {error}") from None


class Losses:
    """Every report of the run, in order."""

    def __init__(self) -> None:
        self._rows: list[tuple[float, ...]] = []

    def add(self, report: StepReport) -> None:
        norm = math.nan if report.gradient_norm is None else report.gradient_norm
        self._rows.append(
            (
                float(report.step),
                report.loss,
                float(report.tokens),
                report.learning_rate,
                norm,
            )
        )

    def tensors(self) -> dict[str, torch.Tensor]:
        """float64 columns."""
        table = torch.tensor(self._rows, dtype=torch.float64).reshape(-1, len(COLUMNS))
        return {name: table[:, index].contiguous() for index, name in enumerate(COLUMNS)}

    def load(self, tensors: dict[str, torch.Tensor]) -> None:
        """What a checkpoint had."""
        columns = [tensors[name].tolist() for name in COLUMNS]
        self._rows = list(zip(*columns))

    def losses(self) -> Sequence[float]:
        """Of all steps."""
        return [row[1] for row in self._rows]


def checkpoint_tensors(training: Training, losses: Losses) -> Groups:
    """All tensors of a checkpoint, by file."""
    others = {RNG: torch.get_rng_state()}
    others |= {f"{BEST}{name}": each for name, each in training.best.items()}
    return {
        training.learner.file: training.learner.exported(),
        OPTIMIZER: training.optimizer_tensors() | others,
        LOSSES: losses.tensors(),
    }


def restore(training: Training, losses: Losses | None, groups: Groups) -> None:
    """Set a run to what a checkpoint holds.  Without `losses` the run itself has gone further: its
    best weights stay."""
    found = groups[OPTIMIZER]
    best = {name.removeprefix(BEST): each for name, each in found.items() if name.startswith(BEST)}
    optimizer = {name: each for name, each in found.items() if not name.startswith(BEST)}
    rng = optimizer.pop(RNG, None)
    training.restore(groups[training.learner.file], optimizer)
    if rng is not None:
        torch.set_rng_state(rng)
    if losses is not None:
        training.best = best
        losses.load(groups[LOSSES])
