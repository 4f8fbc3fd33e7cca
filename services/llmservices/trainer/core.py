"""The training step, and everything that a checkpoint must hold of it.

Owns the weights, the optimiser and the counters of one rank.  Invariant: the state after step n is
a function of the recipe, the first weights and the batches 0..n-1; random numbers are drawn from
generators that are seeded anew for each micro-batch, by (seed, step, micro-batch, rank).
Must never wait, send or read a clock.
"""

import contextlib
import math
import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

import msgspec
import torch
from llmproto.recipes import TrainingRecipe
from torch import nn

from llmservices.trainer import optimizers, schedules
from llmservices.trainer.batches import Batch, micro_batch, share
from llmservices.trainer.learner import Learner, MicroBatch
from llmservices.trainer.ranks import Alone, Ranks

MEAN_WEIGHT: Final = 0.05
"""Of the newest loss in the running mean that divergence is measured against."""
STEPS_BEFORE_JUDGING: Final = 20
"""The first losses are no measure."""
ROLLBACKS_MAX: Final = 3


class Outcome(msgspec.Struct, frozen=True):
    """What one step came to."""

    loss: float
    tokens: int
    learning_rate: float
    gradient_norm: float


class Progress(msgspec.Struct):
    """The counters of a run: all of them stand in a checkpoint."""

    step: int = 0
    position: int = 0
    """Batches consumed."""
    loss_mean: float = 0.0
    rate_scale: float = 1.0
    rollbacks: int = 0
    best: float | None = None
    """Smallest validation loss."""
    best_step: int = 0
    worse: int = 0
    """Validations since."""


class Diverged(Exception):
    """The loss is no number, or has run away; the weights are those before the step."""


class Training:
    """One rank's part of a run."""

    def __init__(
        self,
        learner: Learner,
        recipe: TrainingRecipe,
        *,
        steps_total: int,
        ranks: Ranks | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.learner = learner
        self.recipe = recipe
        self.steps_total = steps_total
        self.progress = Progress()
        self.device = device or torch.device("cpu")
        self._ranks = ranks or Alone()
        self._wrapped = self._ranks.wrap(learner, bf16=recipe.communication == "bf16")
        self._trained = [
            (name, each) for name, each in learner.named_parameters() if each.requires_grad
        ]
        self._optimizer = optimizers.build(recipe, self._trained)
        self.best: dict[str, torch.Tensor] = {}
        """What is exported of the best validated step, where early stopping wants it."""

    # --- one step ---------------------------------------------------------------------------------

    def step(self, batch: Batch, between: Callable[[], None] = lambda: None) -> Outcome:
        """Learn from one global batch.  `between` is called after every micro-batch."""
        progress, recipe, ranks = self.progress, self.recipe, self._ranks
        self.learner.train()
        targets, total = max(1, batch.targets), 0.0
        parts = share(
            batch, rank=ranks.rank, processes=ranks.processes, micro_batch=recipe.micro_batch
        )
        for index, rows in enumerate(parts):
            # A rank without rows takes part in the exchange with a gradient of nothing.
            weight = 1.0 if rows else 0.0
            micro = micro_batch(rows or batch.rows[:1], batch.task, self._target_device)
            self._seed(index)
            last = index == len(parts) - 1
            with contextlib.nullcontext() if last else ranks.unsynchronised(self._wrapped):
                with self._precision():
                    loss = self._wrapped(micro, recipe.label_smoothing)
                (loss * (weight * ranks.processes / targets)).backward()
            total += weight * loss.item()
            between()
        mean = ranks.summed(total) / targets
        rate = schedules.rate(recipe, progress.step, self.steps_total) * progress.rate_scale
        norm = self._update(mean, rate)
        self._count(mean)
        return Outcome(mean, batch.tokens, rate, norm)

    @property
    def _target_device(self) -> torch.device | None:
        return None if self.device.type == "cpu" else self.device

    def _precision(self) -> contextlib.AbstractContextManager[None]:
        # torch.autocast is unannotated as a context manager
        return torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.recipe.precision == "bf16"
        )

    def _seed(self, index: int) -> None:
        progress = self.progress
        place = (self.recipe.seed, progress.step, index, self._ranks.rank)
        mixed = random.Random(repr(place)).getrandbits(63)
        torch.manual_seed(mixed)
        random.seed(mixed)

    def _update(self, mean: float, rate: float) -> float:
        """Judge, clip, and move; gives the gradient's norm."""
        parameters = [each for _, each in self._trained]
        limit = self.recipe.clip
        norm = nn.utils.clip_grad_norm_(parameters, math.inf if limit is None else limit).item()
        try:
            self._judge(mean, norm)
            for group in self._optimizer.param_groups:
                group["lr"] = rate
            self._optimizer.step()
        finally:
            self._optimizer.zero_grad(set_to_none=True)
        return norm

    def _judge(self, mean: float, norm: float) -> None:
        progress, factor = self.progress, self.recipe.divergence_factor
        place = f"step {progress.step + 1}"
        if not (math.isfinite(mean) and math.isfinite(norm)):
            raise Diverged(f"{place}: loss {mean}, norm of the gradient {norm}")
        if progress.step >= STEPS_BEFORE_JUDGING and mean > factor * progress.loss_mean:
            raise Diverged(
                f"{place}: loss {mean:.4f} is more than {factor:g} x its running mean, "
                f"{progress.loss_mean:.4f}"
            )

    def _count(self, mean: float) -> None:
        progress = self.progress
        progress.loss_mean += (mean - progress.loss_mean) * (MEAN_WEIGHT if progress.step else 1.0)
        progress.step += 1
        progress.position += 1

    # --- validation -------------------------------------------------------------------------------

    @contextlib.contextmanager
    def judging(self) -> Iterator[None]:
        """Without dropout, without gradients, in the recipe's precision."""
        self.learner.eval()
        with torch.no_grad(), self._precision():
            yield
        self.learner.train()

    def micro_batches(self, batch: Batch) -> Iterator[MicroBatch]:
        """All of a batch, for validation on this rank alone."""
        for rows in share(batch, rank=0, processes=1, micro_batch=self.recipe.micro_batch):
            yield micro_batch(rows, batch.task, self._target_device)

    def validated(self, loss: float) -> bool:
        """Take note of a validation; True where training is to stop early."""
        progress, patience = self.progress, self.recipe.stop_early_after
        if progress.best is None or loss < progress.best:
            progress.best, progress.best_step, progress.worse = loss, progress.step, 0
            if patience is not None:
                self.best = {name: each.clone() for name, each in self.learner.exported().items()}
        else:
            progress.worse += 1
        return patience is not None and progress.worse >= patience

    # --- state ------------------------------------------------------------------------------------

    def optimizer_tensors(self) -> dict[str, torch.Tensor]:
        """`NAME.STATE` for each parameter and each of its states."""
        state = self._optimizer.state
        return {
            f"{name}.{key}": value
            for name, parameter in self._trained
            for key, value in state.get(parameter, {}).items()
            if isinstance(value, torch.Tensor)
        }

    def restore(
        self, weights: Mapping[str, torch.Tensor], optimizer: Mapping[str, torch.Tensor]
    ) -> None:
        """Set weights and optimiser to what a checkpoint holds."""
        self.learner.load_exported(weights)
        by_name: dict[str, dict[str, torch.Tensor]] = {}
        for whole, tensor in optimizer.items():
            name, _, key = whole.rpartition(".")
            by_name.setdefault(name, {})[key] = tensor
        state: dict[Any, Any] = {}  # Any: torch's own type of an optimiser's state
        for name, parameter in self._trained:
            if name in by_name:
                state[parameter] = {
                    key: each.to(parameter.device if each.dim() else each.device, copy=True)
                    for key, each in by_name[name].items()
                }
        self._optimizer.state.clear()
        self._optimizer.state.update(state)
