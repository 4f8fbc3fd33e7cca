"""The step thread of one rank: from the kernel's order to the version that it asked for.

Invariant: a step is reported when its update is made, and never changes; what a later attempt
computes for the same step is compared with that.  A checkpoint is said to be committed only after
the store has said that it is whole.
"""

import importlib
import secrets
import time
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Final, Protocol

import msgspec
import torch
from llmproto.errors import ErrorKind, RemoteError, invalid
from llmproto.jobs import StepReport
from llmproto.recipes import Recipe
from llmproto.versions import Digest

from llmservices.trainer import finishing, numerics, setup, state
from llmservices.trainer.core import ROLLBACKS_MAX, Diverged, Training
from llmservices.trainer.pace import Pace
from llmservices.trainer.ranks import Alone, Ranks, Together
from llmservices.trainer.savebuffer import PREFIX, SaveBuffer, bytes_of, folder_for, sweep
from llmservices.trainer.setup import Setup
from llmservices.trainer.source import Asking
from llmservices.trainer.validation import validate
from llmservices.versions.manifest import STATE, read_file, read_manifest
from llmservices.versions.weights import read_tensors

CHECKPOINT_S: Final = 60.0
"""Between checkpoints, where the recipe does not say: what a death costs at most."""
CHECKPOINT_STEPS_MAX: Final = 2048
"""Half of what the kernel keeps beyond a checkpoint."""
MEASURED_STEPS: Final = 20
"""The pace is known after so many."""


class Order(msgspec.Struct, frozen=True):
    """What the kernel has asked for."""

    job: bytes
    attempt: int
    name: str
    recipe: Recipe
    rank: int
    processes: int
    rendezvous: Path
    checkpoint: Digest | None
    reported: list[StepReport]


class Place(msgspec.Struct, frozen=True):
    """What the kernel has granted."""

    device: torch.device
    threads: int
    run: Path
    """Folder for what does not outlive the job."""


class Bus(Asking, Protocol):
    """What the step thread says."""

    def report(self, report: StepReport, *, steps_total: int) -> None:
        """A step is done."""

    def doing(self, what: str) -> None:
        """For people."""

    def moved(self) -> None:
        """Progress, though no step."""

    def save(self, checkpoint: finishing.Checkpoint) -> "Future[Digest]":
        """Begin to save; the future is there when the kernel has taken note of it."""


class Board(Protocol):
    """Curves for people."""

    def add(self, report: StepReport) -> None:
        """One step."""

    def close(self) -> None:
        """Write what is left."""


class Stopped(Exception):
    """What could be saved is; the process is to leave."""


class Result(msgspec.Struct, frozen=True):
    """How it ended."""

    version: Digest | None
    metrics: dict[str, float]
    detail: str = ""


class Work:
    """One rank of one attempt."""

    def __init__(self, order: Order, place: Place, bus: Bus, pace: Pace) -> None:
        self._order = order
        self._place = place
        self._bus = bus
        self._pace = pace
        self._losses = state.Losses()
        self._validations: dict[int, dict[str, float]] = {}
        self._reported = {report.step: report for report in order.reported}
        self._committed = order.checkpoint
        self._saving: Future[Digest] | None = None
        self._buffer: SaveBuffer | None = None
        self._every = order.recipe.training.checkpoint_every
        self._note = ""
        self._ranks: Ranks = Alone()
        self._board: Board | None = None
        self._contract: numerics.Contract = {}
        self._folder = Path()

    def run(self) -> Result:
        """Everything.  Raises RemoteError where the job cannot succeed, Stopped where it is to
        leave."""
        order, place = self._order, self._place
        numerics.fix(place.threads)
        self._bus.doing("preparing")
        parent, content = self._read_checkpoint()
        made = place.run / f"tokenizer-{order.job.hex()}-{order.rank}"
        ready = setup.set_up(self._bus, order.recipe, parent=parent, made=made)
        self._bus.moved()
        if order.processes > 1:
            self._ranks = Together(order.rendezvous, order.rank, order.processes, place.device)
        ready.built.learner.to(place.device)
        training = Training(
            ready.built.learner,
            order.recipe.training,
            steps_total=ready.steps_total,
            ranks=self._ranks,
            device=place.device,
        )
        self._contract = numerics.contract(
            order.recipe.training, processes=order.processes, device=place.device
        )
        if content is not None:
            self._resume(training, ready, content)
        if order.rank == 0 and order.recipe.finish.tensorboard is not None:
            folder = Path(order.recipe.finish.tensorboard)
            tensorboard = importlib.import_module("llmservices.trainer.tensorboard")  # seconds
            self._board = tensorboard.Board(folder, training.progress.step)
        self._bus.doing(self._note)
        self._train(training, ready)
        return self._finish(training, ready)

    # --- resuming ---------------------------------------------------------------------------------

    def _read_checkpoint(self) -> tuple[bytes | None, state.State | None]:
        """The base that the checkpoint was trained from, and its state."""
        if self._committed is None:
            return None, None
        row = setup.version_row(self._bus, f"@{self._committed.hex()}")
        manifest, _ = read_manifest(Path(row.path))
        entry = manifest.file(STATE)
        if entry is None:
            raise invalid(f"{row.reference} is no checkpoint: it has no {STATE}")
        self._folder = Path(row.path)
        return row.lineage.parent, state.decode(read_file(self._folder, entry), row.reference)

    def _resume(self, training: Training, ready: Setup, found: state.State) -> None:
        plan = ready.train.prepared.plan.hex()
        if found.plan != plan:
            raise invalid(
                f"the data has changed since the checkpoint of step {found.progress.step}: its "
                f"plan was {found.plan}, it is {plan}"
            )
        self._load(training, self._folder, self._losses)
        training.progress = found.progress
        self._validations = dict(found.validations)
        self._every = found.checkpoint_every or self._every
        changed = numerics.differences(found.contract, self._contract)
        if changed:
            self._note = f"resumed under another numerics contract: {changed}"

    def _load(self, training: Training, folder: Path, losses: state.Losses | None) -> None:
        files = (training.learner.file, state.OPTIMIZER, state.LOSSES)
        state.restore(training, losses, {file: read_tensors(folder, file) for file in files})

    # --- training ---------------------------------------------------------------------------------

    def _train(self, training: Training, ready: Setup) -> None:
        began_s, first = time.monotonic(), training.progress.step
        self._pace.begin()
        while training.progress.step < ready.steps_total:
            if self._ranks.told(int(self._pace.is_stopping)):
                self._stop(training, ready)
            stops = self._step(training, ready)
            step = training.progress.step
            if step == first + 1 and self._order.rank == 0:
                # The optimiser's state is there from now on: memory is touched once, not during
                # the first checkpoint.
                self._room(bytes_of(state.checkpoint_tensors(training, self._losses)), ready)
            if self._every is None and step - first == MEASURED_STEPS:
                step_s = (time.monotonic() - began_s) / MEASURED_STEPS
                self._every = min(CHECKPOINT_STEPS_MAX, max(1, round(CHECKPOINT_S / step_s)))
            if stops:
                break
            if self._every is not None and step % self._every == 0 and step < ready.steps_total:
                self._checkpoint(training, ready)

    def _step(self, training: Training, ready: Setup) -> bool:
        """One step, judged and reported; True where training is to stop early."""
        began_s = time.monotonic()
        with self._pace.waiting():
            batch = ready.train.batch(training.progress.position)
        try:
            outcome = training.step(batch, self._between)
        except Diverged as error:
            self._roll_back(training, ready, error)
            return False
        metrics, stops = self._validate(training, ready)
        if self._order.rank:
            return stops
        step = training.progress.step
        report = StepReport(
            step=step,
            loss=outcome.loss,
            tokens=outcome.tokens,
            learning_rate=outcome.learning_rate,
            gradient_norm=outcome.gradient_norm,
            ms=(time.monotonic() - began_s) * 1000,
            metrics=metrics,
        )
        report = self._compared(report)
        self._losses.add(report)
        self._bus.report(report, steps_total=ready.steps_total)
        if self._board is not None:
            self._board.add(report)
        return stops

    def _between(self) -> None:
        self._bus.moved()
        self._pace.rest()

    def _compared(self, report: StepReport) -> StepReport:
        """With what an earlier attempt said of this step."""
        before = self._reported.pop(report.step, None)
        if before is None or before.loss == report.loss:
            return report
        if self._place.device.type == "cpu" and not self._note:
            raise RemoteError(
                ErrorKind.INTERNAL,
                f"step {report.step} was computed again and gave the loss {report.loss!r}; it was "
                f"reported as {before.loss!r}: this machine does not compute the same twice",
            )
        difference = abs(report.loss - before.loss)
        return msgspec.structs.replace(report, difference=difference)

    def _validate(self, training: Training, ready: Setup) -> tuple[dict[str, float], bool]:
        """Where one is due: its results (on rank 0), and whether to stop early (on all)."""
        step, every = training.progress.step, self._order.recipe.training.validate_every
        due = step % (every or ready.epoch_batches) == 0 or step == ready.steps_total
        if ready.validation is None or not due:
            return {}, False
        metrics: dict[str, float] = {}
        stops = False
        if self._order.rank == 0:
            metrics = validate(
                training, ready.validation, self._order.recipe.finish.evaluate, self._between
            )
            self._validations[step] = metrics
            stops = training.validated(metrics["loss"])
        return metrics, bool(self._ranks.told(int(stops)))

    def _roll_back(self, training: Training, ready: Setup, error: Diverged) -> None:
        """To the last checkpoint, at half the rate, past the batch that it happened at."""
        recipe, progress = self._order.recipe.training, training.progress
        self._settle()
        if recipe.on_divergence != "rollback" or progress.rollbacks >= ROLLBACKS_MAX:
            tried = f" after {progress.rollbacks} roll-backs" if progress.rollbacks else ""
            raise RemoteError(
                ErrorKind.INTERNAL,
                f"training diverged{tried}: {error}; try a smaller training.learning_rate, or "
                'training.on_divergence = "rollback"',
            )
        digest = self._agreed(self._committed)
        if digest is None:
            raise RemoteError(
                ErrorKind.INTERNAL, f"training diverged before its first checkpoint: {error}"
            )
        row = setup.version_row(self._bus, f"@{digest.hex()}")
        self._load(training, Path(row.path), None)
        progress.position += 1
        progress.rate_scale /= 2
        progress.rollbacks += 1
        self._bus.doing(f"rolled back: {error}")
        self._checkpoint(training, ready)

    def _agreed(self, digest: Digest | None) -> Digest | None:
        """Rank 0's, on all ranks."""
        if not self._ranks.told(int(digest is not None)):
            return None
        whole = digest or bytes(32)
        parts = [int.from_bytes(whole[at : at + 4], "big") for at in range(0, 32, 4)]
        return b"".join(self._ranks.told(part).to_bytes(4, "big") for part in parts)

    # --- saving -----------------------------------------------------------------------------------

    def _checkpoint(self, training: Training, ready: Setup) -> None:
        """Copy the state, and have it saved while training goes on."""
        if self._order.rank:
            return
        self._settle()
        groups = state.checkpoint_tensors(training, self._losses)
        buffer = self._room(bytes_of(groups), ready)
        written = buffer.write(groups)
        found = state.State(
            progress=msgspec.structs.replace(training.progress),
            contract=self._contract,
            steps_total=ready.steps_total,
            checkpoint_every=self._every or 0,
            plan=ready.train.prepared.plan.hex(),
            seed=self._order.recipe.training.seed,
            validations=self._validations,
        )
        self._saving = self._bus.save(
            finishing.checkpoint(self._order.job, self._order.name, ready, found, written, buffer)
        )

    def _room(self, length: int, ready: Setup) -> SaveBuffer:
        """The buffer, as long as this at least; made anew only where it is too short."""
        if self._buffer is not None and self._buffer.length >= length:
            return self._buffer
        if self._buffer is not None:
            self._buffer.close()
            self._buffer = None
        # The file of losses grows with every step.
        length += 8 * len(state.COLUMNS) * (ready.steps_total + 8)
        folder = folder_for(length, self._place.run)
        sweep(folder)
        name = f"{PREFIX}{self._order.job.hex()}-{secrets.token_hex(4)}"
        self._buffer = SaveBuffer(folder / name, length)
        return self._buffer

    def _settle(self) -> None:
        """Wait for the save that is on its way."""
        if self._saving is None:
            return
        saving, self._saving = self._saving, None
        try:
            with self._pace.waiting():
                self._committed = saving.result()
        except RemoteError as error:
            if error.kind is not ErrorKind.EXHAUSTED:
                raise
            self._bus.doing(f"no checkpoint: {error.detail}")  # training itself needs no disk

    def _stop(self, training: Training, ready: Setup) -> None:
        """Save what there is, and leave."""
        self._bus.doing("saving")
        if training.progress.step:
            self._checkpoint(training, ready)
            self._settle()
        self.close()
        raise Stopped

    def _finish(self, training: Training, ready: Setup) -> Result:
        if self._order.rank:
            return Result(None, {})
        self._settle()
        self._bus.doing("publishing")
        progress = msgspec.structs.replace(training.progress)
        if training.best:
            progress.step = progress.best_step
        metrics = self._final_metrics(progress.step)
        groups = finishing.model_tensors(training, ready, self._losses)
        buffer = self._room(bytes_of(groups), ready)
        version, detail = finishing.publish(
            self._bus,
            self._order.job,
            self._order.recipe,
            ready,
            buffer.write(groups),
            buffer,
            progress,
            metrics,
        )
        if progress.step < training.progress.step:
            best = f"the weights are those of step {progress.step}, validated best"
            detail = f"{best}; {detail}" if detail else best
        self.close()
        return Result(version, metrics, detail)

    def _final_metrics(self, step: int) -> dict[str, float]:
        """Of what is published."""
        losses: Sequence[float] = self._losses.losses()[:step]
        last = self._validations.get(step)
        if last is None and self._validations:
            last = self._validations[max(self._validations)]
        named = {
            ("validation_loss" if key == "loss" else key): v for key, v in (last or {}).items()
        }
        return {"train_loss": losses[-1]} | named if losses else named

    def abandon(self) -> None:
        """The process ends, on whatever thread this is said: nothing of it may stay."""
        buffer = self._buffer
        if buffer is not None:
            buffer.unlink()

    def close(self) -> None:
        """Give back what outlives a process."""
        if self._buffer is not None:
            self._buffer.close()
            self._buffer = None
        if self._board is not None:
            self._board.close()
