"""What goes into the engine and what comes out: plain structs, no torch.

The shell builds `Admission` from a `Run` and turns a `StepResult` into `Stepped`, `GaveBack`
and `Refused`. Positions count from 0, the first prompt token.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec
from llmproto.errors import RemoteError, invalid
from llmproto.generation import Sampling, TokenScore

PlanHook = Callable[[list[tuple[bytes, int]]], None]
END_NONE = 0
END_STOP = 1
END_LENGTH = 2


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Sizes of one engine.  Exactly one of `blocks` and `kv_bytes` is given."""

    blocks: int | None = None
    """KV blocks."""
    kv_bytes: int | None = None
    """Memory for KV blocks; as many as fit, at least one."""
    block_tokens: int = 16
    residents_max: int = 256
    """Threads held at once; ended ones count until they are dropped."""
    step_tokens: int = 512
    """Rows of one step; a longer prefill goes in chunks."""
    mixed_step_ms: int | None = None
    """How long a step should take that computes prompts beside answers under way; absent: as long
    as its rows take."""
    exact: bool = False
    """Same bits for a thread whatever runs beside it (see `attention.py`)."""
    threads: int | None = None
    """Threads of the native step; absent: as many as torch has."""

    def __post_init__(self) -> None:
        if (self.blocks is None) == (self.kv_bytes is None):
            raise invalid("engine: give either blocks or kv_bytes")
        for name, value in (
            ("blocks", self.blocks if self.blocks is not None else 1),
            ("kv_bytes", self.kv_bytes if self.kv_bytes is not None else 1),
            ("block_tokens", self.block_tokens),
            ("residents_max", self.residents_max),
            ("step_tokens", self.step_tokens),
            ("mixed_step_ms", 1 if self.mixed_step_ms is None else self.mixed_step_ms),
        ):
            if value < 1:
                raise invalid(f"engine: {name} is {value}; at least 1")


class Admission(msgspec.Struct, frozen=True, kw_only=True):
    """One thread's context, as `Run` carries it."""

    thread: bytes
    residency: int
    tokens: Sequence[int]
    """All ids so far: the prompt and what was committed after it.  The next proposal has
    position `len(tokens)`."""
    prompt_tokens: int
    output_tokens_max: int
    """Counted from the prompt's end.  0: score the prompt only."""
    sampling: Sampling = Sampling()
    service_class: int = 1
    priority: int = 0
    domain: bytes = b""
    """Prefixes are shared inside it only."""
    prompt_scores: bool = False
    lengths: Sequence[int] = ()
    """Of an encoder's call: tokens of each input."""
    pair_at: Sequence[int] = ()
    """Of an encoder's call: tokens of each input before its second text; empty: none has one."""


class Proposal(msgspec.Struct, frozen=True):
    """One row of `Stepped`."""

    thread: bytes
    residency: int
    position: int
    token: int | None
    """Absent only together with an end: no further token."""
    end: int
    """0, END_STOP (the stop token is this row's token) or END_LENGTH."""
    score: TokenScore | None = None
    prompt_scores: list[TokenScore] | None = None


class Computed(msgspec.Struct, frozen=True):
    """A complete call of an encoder."""

    thread: bytes
    residency: int
    width: int
    vectors: bytes
    """Inputs x width float32, little endian."""


class Failure(msgspec.Struct, frozen=True):
    """A thread that the engine gave up; it is no longer resident."""

    thread: bytes
    residency: int
    error: RemoteError


class StepResult(msgspec.Struct, frozen=True):
    """What one step did."""

    rows: list[Proposal]
    gave_back: list[tuple[bytes, int]]
    """(thread, residency), no longer resident: no block was left for them."""
    failed: list[Failure]
    blocks_free: int
    """Free ones, those included that hold nothing but cached prefixes."""
    vectors: list[Computed] = []
    """Of an encoder: calls that are complete now."""


class Stepping(Protocol):
    """What the step loop knows of an engine, whatever it computes."""

    blocks: int
    context_tokens: int
    memory_bytes: int
    path: str
    counters: "Counters"

    @property
    def config(self) -> EngineConfig: ...

    @property
    def blocks_free(self) -> int: ...

    def add(self, admission: Admission) -> None: ...

    def drop(self, residency: int) -> None: ...

    def watermark(self, residency: int, position: int) -> None: ...

    def proposals_after(self, residency: int, position: int) -> list[Proposal]: ...

    def computed(self, residency: int) -> list[Computed]: ...

    def residencies(self) -> list[int]: ...

    def runnable(self) -> bool: ...

    def step(self, beside_tokens: int | None = None) -> StepResult: ...


class Counters(msgspec.Struct):
    """Since the engine began."""

    steps: int = 0
    rows: int = 0
    """Rows computed, prefill included."""
    tokens: int = 0
    """Proposed."""
    prefill_tokens: int = 0
    """Rows that belong to chunks of more than one token."""
    cached_tokens: int = 0
    """Rows saved by shared prefixes."""
    gave_back: int = 0
