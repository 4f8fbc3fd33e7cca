"""The executor's core: one model, its KV blocks, and the threads that are resident on it.

Owns the order of a step: plan, tell the hook, forward, sample, propose.  Knows no socket and no clock.  Not
thread-safe: one caller at a time.  Errors that are a caller's are `RemoteError`; a thread that fails inside a
step comes back in `StepResult.failed` and hurts no other.
"""

from llmservices.executor.contract import (
    Admission,
    Counters,
    EngineConfig,
    PlanHook,
    Proposal,
    StepResult,
)
from llmservices.models.loading import Model


class Engine:
    """Continuous batching over one model.

    Invariant: a thread is never more than `limits.STEPS_AHEAD_MAX` positions beyond its watermark; every proposal
    beyond the watermark is remembered until the thread is dropped, given back or has failed.
    """

    def __init__(
        self, model: Model, config: EngineConfig, *, on_plan: PlanHook | None = None
    ) -> None:
        """`on_plan` gets [(thread, position)] of each step, position being the one that it works for, after the plan
        is made and before anything is computed."""
        raise NotImplementedError

    context_tokens: int
    """The longest context that it takes: the model's or the cache's, whichever is less."""
    blocks: int
    memory_bytes: int
    """Weights and KV cache."""
    path: str
    """For people: precision and code path."""
    counters: Counters

    def add(self, admission: Admission) -> None:
        """Take a thread.  INVALID: it can never fit (both numbers), or an id is out of range; EXHAUSTED: `residents_max`
        reached; STALE: its residency is resident already."""
        raise NotImplementedError

    def drop(self, residency: int) -> None:
        """Forget a residency and free its blocks; unknown ones are ignored."""
        raise NotImplementedError

    def watermark(self, residency: int, position: int) -> None:
        """Every position up to this one is committed.  Never goes back; unknown residencies are ignored."""
        raise NotImplementedError

    def proposals_after(self, residency: int, position: int) -> list[Proposal]:
        """What was proposed beyond `position` and is not under the watermark, oldest first, to be sent again."""
        raise NotImplementedError

    def residencies(self) -> list[int]:
        """All that are held, ended ones that were not dropped included."""
        raise NotImplementedError

    def runnable(self) -> bool:
        """Whether `step` may do something now; else only add, drop or watermark changes that."""
        raise NotImplementedError

    @property
    def blocks_free(self) -> int:
        raise NotImplementedError

    def step(self) -> StepResult:
        """Plan and compute one step.  Without anything to do: an empty result."""
        raise NotImplementedError

    def check(self) -> None:
        """Assert every invariant of the tables."""
        raise NotImplementedError
