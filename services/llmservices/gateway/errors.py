"""Failures as HTTP: one status and one OpenAI error body for each kind.

Source: OpenAI API reference, error codes; RFC 9110 for the statuses. 499 (the caller cancelled) is
the custom of HTTP proxies.
"""

from typing import Final

import msgspec
from llmproto.errors import ErrorKind, RemoteError

CANCELLED: Final = 499
RETRY_MS: Final = 1_000
"""Where the system knows no better time."""


class ErrorDetail(msgspec.Struct, frozen=True):
    """What went wrong."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(msgspec.Struct, frozen=True):
    """Every answer with a status of 400 or more."""

    error: ErrorDetail


STATUSES: Final[dict[ErrorKind, tuple[int, str]]] = {
    ErrorKind.INVALID: (400, "invalid_request_error"),
    ErrorKind.DENIED: (403, "permission_error"),
    ErrorKind.EXHAUSTED: (429, "rate_limit_error"),
    ErrorKind.DEADLINE: (504, "timeout_error"),
    ErrorKind.UNAVAILABLE: (503, "service_unavailable_error"),
    ErrorKind.STALE: (404, "not_found_error"),
    ErrorKind.INTERNAL: (500, "server_error"),
}
TYPES: Final[dict[int, str]] = {
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
}


class HttpError(Exception):
    """An answer with a status of 400 or more."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str | None = None,
        param: str | None = None,
        code: str | None = None,
        retry_after_ms: int | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        default = "server_error" if status >= 500 else "invalid_request_error"
        kind = type if type is not None else TYPES.get(status, default)
        self.body = ErrorBody(ErrorDetail(message, kind, param, code))
        self.headers = dict(headers or {})
        if retry_after_ms is not None:
            self.headers["retry-after"] = str(max(1, -(-retry_after_ms // 1000)))
            self.headers["retry-after-ms"] = str(retry_after_ms)

    @property
    def json(self) -> bytes:
        """The body."""
        return msgspec.json.encode(self.body)


def invalid_field(message: str, param: str | None, *, code: str | None = None) -> HttpError:
    """The caller's mistake in one field."""
    return HttpError(400, message, param=param, code=code)


def model_not_found(name: str, detail: str) -> HttpError:
    """No such model."""
    return HttpError(
        404,
        f"model {name!r}: {detail}",
        type="invalid_request_error",
        param="model",
        code="model_not_found",
    )


def of_remote(error: RemoteError) -> HttpError:
    """What a failure of the system is to a caller of HTTP."""
    status, kind = STATUSES[error.kind]
    retry_after_ms = error.retry_after_ms
    if error.kind in (ErrorKind.EXHAUSTED, ErrorKind.UNAVAILABLE) and not retry_after_ms:
        retry_after_ms = RETRY_MS
    return HttpError(
        status,
        error.detail,
        type=kind,
        code=error.kind.value.lower(),
        retry_after_ms=retry_after_ms,
    )


def cancelled(detail: str) -> HttpError:
    """Somebody ended the generation before its end."""
    return HttpError(
        CANCELLED, detail or "the generation was cancelled", type="cancelled", code="cancelled"
    )
