"""The executor's core for encoders: one model, and the calls that are resident on it.

Owns the order of a step: choose inputs, tell the hook, compute, hand out what is complete.  Knows
no socket and no clock.  Not thread-safe: one caller at a time.  There is no cache: a call that
leaves before its end begins anew elsewhere.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import msgspec
import numpy as np
import torch
from llmproto import limits
from llmproto.errors import ErrorKind, RemoteError, invalid

from llmservices.executor.contract import (
    Admission,
    Computed,
    Counters,
    EngineConfig,
    Failure,
    PlanHook,
    Proposal,
    StepResult,
)
from llmservices.models.encoder import Encoder, EncoderModel

RESULT_BYTES_MAX = limits.MESSAGE_BYTES_MAX // 2
"""Vectors of one call: they leave in one message, with room for its frame and for others."""


PIECE_TOKENS = 512
"""What one thread computes at a time: its activations stay in its cache, and pieces are many enough
to share."""


class Waiting(msgspec.Struct, frozen=True):
    """A call as the planner sees it."""

    residency: int
    rank: tuple[int, int, int]
    """Class, minus priority, age: smaller is served first."""
    lengths: Sequence[int]
    """Of all inputs."""
    done: int
    """How many of them are computed; they are taken in order."""


class Chosen(msgspec.Struct, frozen=True):
    """One input of one call."""

    residency: int
    input: int
    tokens: int


def choose(calls: Sequence[Waiting], *, step_tokens: int) -> list[Chosen]:
    """The inputs of the next step, those of equal length together.

    By rank, each call's inputs in order, until the next one would exceed `step_tokens`; at least
    one, however long.  What is chosen never depends on lengths further back, so nobody starves.
    """
    chosen: list[Chosen] = []
    left = step_tokens
    for call in sorted(calls, key=lambda call: call.rank):
        for number in range(call.done, len(call.lengths)):
            tokens = call.lengths[number]
            if tokens > left and chosen:
                return sorted(chosen, key=_place)
            chosen.append(Chosen(call.residency, number, tokens))
            left -= tokens
    return sorted(chosen, key=_place)


def cut(chosen: Sequence[Chosen], *, piece_tokens: int) -> list[list[Chosen]]:
    """The inputs in their order, in pieces of about so many tokens."""
    pieces: list[list[Chosen]] = []
    left = 0
    for one in chosen:
        if not pieces or one.tokens > left:
            pieces.append([])
            left = piece_tokens
        pieces[-1].append(one)
        left -= one.tokens
    return pieces


def _alone() -> None:
    """A worker computes by itself."""
    torch.set_num_threads(1)


def _place(chosen: Chosen) -> tuple[int, int, int]:
    return (chosen.tokens, chosen.residency, chosen.input)


class Resident:
    """One call while it is here.

    Invariant: inputs before `done` are computed, none from there on.
    """

    __slots__ = ("admission", "age", "done", "starts", "tokens", "types", "vectors")

    def __init__(self, admission: Admission, *, age: int, width: int) -> None:
        self.admission = admission
        self.age = age
        lengths = admission.lengths
        self.tokens = np.asarray(admission.tokens, dtype=np.int64)
        self.starts = np.concatenate([[0], np.cumsum(lengths)])
        self.types = np.zeros(len(self.tokens), dtype=np.int64)
        for number, at in enumerate(admission.pair_at):
            self.types[self.starts[number] + at : self.starts[number + 1]] = 1
        self.vectors = np.empty((len(lengths), width), dtype="<f4")
        self.done = 0

    @property
    def complete(self) -> bool:
        """Nothing is left to compute."""
        return self.done == len(self.admission.lengths)

    def computed(self) -> Computed:
        """What goes out, once it is complete."""
        return Computed(
            self.admission.thread,
            self.admission.residency,
            self.vectors.shape[1],
            self.vectors.tobytes(),
        )


class EncoderEngine:
    """Batching of inputs over one encoder.

    Invariant: what was computed of a call is kept until it is dropped.
    """

    def __init__(
        self,
        model: EncoderModel,
        config: EngineConfig,
        *,
        on_plan: PlanHook | None = None,
        workers: int = 1,
    ) -> None:
        """`on_plan` gets [(thread, inputs computed so far)] of each step before it is computed.
        `workers`: threads that share a step, each with inputs of its own."""
        self._model = model
        self._config = config
        self._on_plan = on_plan
        self.blocks = config.blocks or 0
        self.context_tokens = model.context_tokens
        self.memory_bytes = model.weight_bytes
        kind = "torch" if isinstance(model, Encoder) else "transformers"
        mode = "exact" if config.exact else "fast"
        dtype = str(model.dtype).removeprefix("torch.")
        self.path = f"{dtype} {model.device.type} {kind} encoder {mode}"
        self.counters = Counters()
        self._pool = ThreadPoolExecutor(workers, "encode", _alone) if workers > 1 else None
        self._residents: dict[int, Resident] = {}
        self._age = 0

    @property
    def config(self) -> EngineConfig:
        """The sizes that it was made with."""
        return self._config

    @property
    def blocks_free(self) -> int:
        """There are none to run out of."""
        return self.blocks

    def add(self, admission: Admission) -> None:
        """Take a call.

        INVALID: an input that can never be computed here; EXHAUSTED: `residents_max` reached;
        STALE: its residency is resident already.
        """
        if admission.residency in self._residents:
            raise RemoteError(ErrorKind.STALE, f"residency {admission.residency} is resident")
        if len(self._residents) >= self._config.residents_max:
            raise RemoteError(
                ErrorKind.EXHAUSTED,
                f"{len(self._residents)} threads are resident, the most this executor takes",
                retry_after_ms=limits.RUN_RESEND_MS,
            )
        self._refuse(admission)
        self._age += 1
        self._residents[admission.residency] = Resident(
            admission, age=self._age, width=self._model.width
        )

    def _refuse(self, admission: Admission) -> None:
        lengths = admission.lengths
        if sum(lengths) != len(admission.tokens) or not lengths:
            raise invalid(
                f"inputs of {sum(lengths)} tokens together, {len(admission.tokens)} tokens came"
            )
        if max(lengths) > self.context_tokens:
            raise invalid(
                f"an input has {max(lengths)} tokens; the model takes {self.context_tokens}"
            )
        ids = np.asarray(admission.tokens)
        worst = int(ids.min()) if int(ids.min()) < 0 else int(ids.max())
        if not 0 <= worst < self._model.vocab_tokens:
            raise invalid(
                f"token id {worst}; the model's vocabulary ends at {self._model.vocab_tokens - 1}"
            )
        size = 4 * len(lengths) * self._model.width
        if size > RESULT_BYTES_MAX:
            raise invalid(
                f"{len(lengths)} inputs give {size} bytes of {self._model.width} numbers each; at "
                f"most {RESULT_BYTES_MAX} leave together: send fewer inputs in one call"
            )

    def drop(self, residency: int) -> None:
        """Forget a residency; unknown ones are ignored."""
        self._residents.pop(residency, None)

    def watermark(self, residency: int, position: int) -> None:
        """Nothing is committed in parts."""

    def proposals_after(self, residency: int, position: int) -> list[Proposal]:
        """An encoder proposes no tokens."""
        return []

    def computed(self, residency: int) -> list[Computed]:
        """The call's vectors, if they are complete, to be sent again."""
        resident = self._residents.get(residency)
        return [resident.computed()] if resident is not None and resident.complete else []

    def residencies(self) -> list[int]:
        """All that are held."""
        return list(self._residents)

    def runnable(self) -> bool:
        """Whether `step` has something to do."""
        return any(not resident.complete for resident in self._residents.values())

    def check(self) -> None:
        """Assert the invariants."""
        for residency, resident in self._residents.items():
            assert residency == resident.admission.residency
            assert 0 <= resident.done <= len(resident.admission.lengths)

    # --- the step ---------------------------------------------------------------------------------

    def step(self, beside_tokens: int | None = None) -> StepResult:
        """Compute one step.  Without anything to do: an empty result.  No input goes on for many
        steps: there is nothing that others would be computed beside."""
        calls = [self._waiting(r) for r in self._residents.values() if not r.complete]
        chosen = choose(calls, step_tokens=self._config.step_tokens)
        names = dict.fromkeys(one.residency for one in chosen)
        if self._on_plan is not None and chosen:
            working = [self._residents[residency] for residency in names]
            self._on_plan([(r.admission.thread, r.done) for r in working])
        failed: list[Failure] = []
        complete: list[Computed] = []
        if chosen:
            self._compute(chosen)
        for residency in names:
            resident = self._residents[residency]
            resident.done += sum(one.residency == residency for one in chosen)
            if not np.isfinite(resident.vectors[: resident.done]).all():
                failed.append(self._fail(resident))
            elif resident.complete:
                complete.append(resident.computed())
        return StepResult([], [], failed, self.blocks, complete)

    def _waiting(self, resident: Resident) -> Waiting:
        admission = resident.admission
        rank = (admission.service_class, -admission.priority, resident.age)
        return Waiting(admission.residency, rank, admission.lengths, resident.done)

    def _compute(self, chosen: list[Chosen]) -> None:
        """In pieces that no two threads wait for each other in: inputs are independent, and a
        barrier at every operation costs more than it gains, most of all on shared cores."""
        pieces = cut(chosen, piece_tokens=PIECE_TOKENS)
        if self._pool is None or len(pieces) == 1:
            for piece in pieces:
                self._encode(piece)
        else:
            for _ in self._pool.map(self._encode, pieces):
                pass
        self.counters.steps += 1
        rows = sum(one.tokens for one in chosen)
        self.counters.rows += rows
        self.counters.prefill_tokens += rows

    def _encode(self, piece: list[Chosen]) -> None:
        """In exact mode every input for itself, so that nothing beside it changes a shape."""
        for batch in [[one] for one in piece] if self._config.exact else [piece]:
            vectors = self._model.encode(
                self._column(batch, "tokens"),
                self._column(batch, "types"),
                [one.tokens for one in batch],
            ).numpy()
            for row, one in enumerate(batch):
                self._residents[one.residency].vectors[one.input] = vectors[row]

    def _column(self, batch: list[Chosen], name: str) -> np.ndarray:
        parts = []
        for one in batch:
            resident = self._residents[one.residency]
            rows = slice(resident.starts[one.input], resident.starts[one.input + 1])
            parts.append((resident.tokens if name == "tokens" else resident.types)[rows])
        return np.concatenate(parts)

    def _fail(self, resident: Resident) -> Failure:
        bad = np.flatnonzero(~np.isfinite(resident.vectors[: resident.done]).all(axis=1))
        del self._residents[resident.admission.residency]
        error = RemoteError(
            ErrorKind.INTERNAL,
            f"the model gave numbers that are none for input {int(bad[0])} ({len(bad)} inputs): "
            "its weights are broken, or too wide for their precision",
        )
        return Failure(resident.admission.thread, resident.admission.residency, error)
