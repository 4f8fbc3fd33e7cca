"""The closed set of failure kinds, and the one exception that carries them."""

import enum


class ErrorKind(enum.StrEnum):
    """Whose fault a failure is, and so what the caller does; `detail` is only for people."""

    INVALID = "INVALID"
    """The caller broke the schema or a stated range: fix the call, never retry it."""
    STALE = "STALE"
    """The caller's handle, offset or generation has passed: look the thing up again."""
    DENIED = "DENIED"
    """The caller lacks the right."""
    EXHAUSTED = "EXHAUSTED"
    """No block, credit, quota or lease is left: retry after `retry_after_ms`."""
    DEADLINE = "DEADLINE"
    """Time ran out, or the caller cancelled."""
    UNAVAILABLE = "UNAVAILABLE"
    """The service is down, starting or draining: retry; the supervisor is at work."""
    INTERNAL = "INTERNAL"
    """An invariant of ours broke: report it."""


class RemoteError(Exception):
    """A failure as it crosses a boundary: what a peer answered, or what must be answered to it."""

    def __init__(self, kind: ErrorKind, detail: str, *, retry_after_ms: int | None = None) -> None:
        super().__init__(f"{kind.value}: {detail}")
        self.kind = kind
        self.detail = detail
        self.retry_after_ms = retry_after_ms


def invalid(detail: str) -> RemoteError:
    """The caller's mistake, ready to raise."""
    return RemoteError(ErrorKind.INVALID, detail)
