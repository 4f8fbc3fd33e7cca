"""Requests that wait for their answers: when to repeat which, and when to give up.

A repeated request keeps its id, so that an answer to any of its copies answers it.
"""

from enum import Enum
from typing import Final

from llmproto import limits
from llmproto.base import Header, Message
from llmproto.connection import Failed
from llmproto.errors import ErrorKind
from llmproto.kinds import kind_of

from libllm.events import Send
from libllm.timers import Timer, Timers

MS: Final = 1_000_000
BACKOFF_MS_FIRST: Final = 50
BACKOFF_MS_MAX: Final = 1_000
STALE_BACKOFF_MS: Final = 250
STALE_MAX: Final = 4
"""A sink that has just started may learn of a stream after it is asked for it; what is still STALE
after a second resend interval of the kernel's is so in earnest."""


class Purpose(Enum):
    """What the answer is for."""

    CALL = 1
    OPEN = 2
    """A Generate: streams come of it."""
    ATTACH = 3
    CANCEL = 4


class Request:
    """One unanswered request."""

    def __init__(
        self,
        header: Header,
        message: Message,
        purpose: Purpose,
        *,
        call: int | None = None,
        stream: bytes = b"",
        deadline_ns: int | None = None,
    ) -> None:
        self.header = header
        self.message = message
        self.purpose = purpose
        self.call = call
        """Whom to tell; absent: nobody any more."""
        self.stream = stream
        self.blobs: tuple[bytes, ...] = ()
        self.deadline_ns = deadline_ns
        self.once = False
        self.wait_exhausted = purpose is not Purpose.CALL
        self.was_sent = False
        self.failures = 0
        self.why = ""
        """What the last answer said that was no reason to stop asking."""
        self.stales = 0

    def wait_ms(self, failed: Failed) -> int | None:
        """How long to wait before this is said again, after that answer; None: the answer
        stands."""
        match failed.kind:
            case ErrorKind.UNAVAILABLE:
                pass
            case ErrorKind.EXHAUSTED if self.wait_exhausted:
                pass
            case ErrorKind.STALE if self.purpose is Purpose.ATTACH and self.stales < STALE_MAX:
                self.stales += 1
                return STALE_BACKOFF_MS << (self.stales - 1)
            case _:
                return None
        if self.once:
            return None
        self.failures += 1
        self.why = failed.detail
        backoff_ms = min(BACKOFF_MS_FIRST << min(self.failures - 1, 10), BACKOFF_MS_MAX)
        return max(backoff_ms, min(failed.retry_after_ms or 0, limits.LINGER_MS))


class Requests:
    """The unanswered requests of one session, in the order in which they were made.

    Invariant: at most REQUESTS_IN_FLIGHT_MAX; every one has a timer, or waits for the connection
    without a deadline.
    """

    def __init__(self, timers: Timers) -> None:
        self._timers = timers
        self._by_id: dict[bytes, Request] = {}
        self._by_call: dict[int, Request] = {}

    def __len__(self) -> int:
        return len(self._by_id)

    @property
    def is_full(self) -> bool:
        """No further one may be made."""
        return len(self._by_id) >= limits.REQUESTS_IN_FLIGHT_MAX

    def add(self, request: Request) -> None:
        """From now on it is outstanding; it still has to be sent."""
        self._by_id[request.header.id] = request
        if request.call is not None:
            assert request.call not in self._by_call, request.call
            self._by_call[request.call] = request
        self._wait(request, None)

    def find(self, request_id: bytes) -> Request | None:
        """The one with this id."""
        return self._by_id.get(request_id)

    def find_call(self, call: int) -> Request | None:
        """The one that this call made."""
        return self._by_call.get(call)

    def all(self) -> list[Request]:
        """Every one, oldest first."""
        return list(self._by_id.values())

    def orphan(self, request: Request, *, until_ns: int) -> None:
        """Nobody waits for the answer any more, yet it matters; until then it is still asked
        for."""
        if request.call is not None:
            del self._by_call[request.call]
        request.call = None
        request.deadline_ns = until_ns
        self._wait(request, until_ns)

    def remove(self, request: Request) -> None:
        """It was answered, or given up."""
        del self._by_id[request.header.id]
        if request.call is not None:
            del self._by_call[request.call]
        self._timers.drop(Timer("request", request.header.id))

    def send(self, request: Request, now_ns: int, *, epoch: int) -> Send:
        """Say it (again), and repeat it in a while."""
        request.was_sent = True
        self._wait(request, now_ns + limits.REQUEST_RETRY_MS * MS)
        header = request.header
        left_ms = None
        if request.deadline_ns is not None:
            left_ms = max(0, request.deadline_ns - now_ns) // MS
        return Send(
            Header(
                version=header.version,
                kind=header.kind,
                id=header.id,
                target=header.target,
                cause=header.cause,
                epoch=epoch,
                deadline_ms=left_ms,
                blobs=header.blobs,
                tenant=header.tenant,
                peer=header.peer,
            ),
            request.message,
            request.blobs,
        )

    def wait(self, request: Request, until_ns: int) -> None:
        """Say it again no earlier than then."""
        self._wait(request, until_ns)

    def pause(self) -> None:
        """The connection is gone: only deadlines run."""
        for request in self._by_id.values():
            self._wait(request, None)

    def pause_one(self, request: Request) -> None:
        """Only its deadline runs."""
        self._wait(request, None)

    def check(self) -> None:
        """Assert the invariant in full."""
        assert len(self._by_id) <= limits.REQUESTS_IN_FLIGHT_MAX
        for request_id, request in self._by_id.items():
            assert request.header.id == request_id
            if request.call is not None:
                assert self._by_call[request.call] is request
            if request.deadline_ns is not None:
                assert self._timers.is_set(Timer("request", request_id))
        for request in self._by_call.values():
            assert self._by_id[request.header.id] is request

    def _wait(self, request: Request, until_ns: int | None) -> None:
        """Set the timer: the time given or the deadline, whichever comes first."""
        timer = Timer("request", request.header.id)
        times = [at_ns for at_ns in (until_ns, request.deadline_ns) if at_ns is not None]
        if times:
            self._timers.set(timer, min(times))
        else:
            self._timers.drop(timer)


def request_header(
    message: Message,
    request_id: bytes,
    *,
    target: str,
    peer: bytes | None = None,
    cause: bytes | None = None,
    tenant: int | None = None,
    blobs: tuple[bytes, ...] = (),
) -> Header:
    """What stays the same of a request's header, however often it is sent."""
    return Header(
        version=limits.PROTOCOL_VERSION,
        kind=kind_of(message),
        id=request_id,
        target=target,
        cause=cause,
        blobs=list(map(len, blobs)),
        tenant=tenant,
        peer=peer,
    )
