"""What can happen to a session, and what it asks its shell to do: two closed unions of frozen
values.

A call is known to the shell by a number of the shell's own choosing; a stream by its id on the
wire.
"""

import msgspec
from llmproto.base import Header, Message
from llmproto.connection import Welcome
from llmproto.errors import ErrorKind
from llmproto.generation import Generate, StreamEnd, TextScore


class Holding(msgspec.Struct, frozen=True):
    """What a service tells with its heartbeat; see llmproto.connection.Beat. A client holds
    nothing."""

    progress: int = 0
    threads: list[bytes] = []
    positions: list[int] = []


# --- events: from the transport and the clock -----------------------------------------------------


class Connected(msgspec.Struct, frozen=True):
    """A connection stands; nothing was said on it."""


class Disconnected(msgspec.Struct, frozen=True):
    """The connection is gone, and with it whatever was on its way."""


class MessageArrived(msgspec.Struct, frozen=True):
    """A message came in, decoded, but for those of plug-in kinds."""

    header: Header
    message: Message
    blobs: tuple[bytes, ...] = ()


class SendRefused(msgspec.Struct, frozen=True):
    """A message that the session wanted to send cannot be a message (too large)."""

    id: bytes
    kind: ErrorKind
    detail: str
    reply_to: bytes | None = None
    """Who asked for it is told."""
    peer: bytes | None = None


class Woke(msgspec.Struct, frozen=True):
    """The time of the last Wake has come; waking early is harmless."""


# --- events: from the caller ----------------------------------------------------------------------


class Call(msgspec.Struct, frozen=True):
    """Ask, and repeat until there is an answer."""

    call: int
    message: Message
    target: str = "kernel"
    peer: bytes | None = None
    cause: bytes | None = None
    tenant: int | None = None
    deadline_ns: int | None = None
    once: bool = False
    """Never say it twice: losing the connection answers UNAVAILABLE."""
    wait_exhausted: bool = False
    """Repeat after EXHAUSTED as after UNAVAILABLE."""
    blobs: tuple[bytes, ...] = ()
    """Frames behind the body."""


class Open(msgspec.Struct, frozen=True):
    """Generate, and listen to the streams that come of it.  Answered like a Call, by Accepted."""

    call: int
    generate: Generate
    tenant: int | None = None
    deadline_ns: int | None = None
    """For everything up to the last token."""
    wait_exhausted: bool = False


class Resume(msgspec.Struct, frozen=True):
    """Listen to a stream that exists, from an offset.  Answered like a Call, by Attached."""

    call: int
    stream: bytes
    offset: int = 0
    scores: int = 0
    tenant: int | None = None
    deadline_ns: int | None = None
    """For everything up to the last token."""


class Post(msgspec.Struct, frozen=True):
    """Say it once; lost where the session is not up."""

    message: Message
    target: str = "kernel"
    peer: bytes | None = None
    cause: bytes | None = None
    tenant: int | None = None
    reply_to: bytes | None = None
    blobs: tuple[bytes, ...] = ()


class Consumed(msgspec.Struct, frozen=True):
    """The caller took a row: its `until` and `tokens`."""

    stream: bytes
    until: int
    tokens: int
    ended: bool = False
    """It took the end: the stream is over."""


class Close(msgspec.Struct, frozen=True):
    """The caller no longer listens to a stream; without `cancel` its thread goes on."""

    stream: bytes
    cancel: bool = True


class Forget(msgspec.Struct, frozen=True):
    """The caller no longer waits for this call's answer. Threads that it may have started are
    cancelled."""

    call: int


class Leave(msgspec.Struct, frozen=True):
    """Say goodbye; streams that are not resumable are cancelled."""

    draining: bool = False


Event = (
    Connected
    | Disconnected
    | MessageArrived
    | SendRefused
    | Woke
    | Call
    | Open
    | Resume
    | Post
    | Consumed
    | Close
    | Forget
    | Leave
)

# --- effects --------------------------------------------------------------------------------------


class Send(msgspec.Struct, frozen=True):
    """Put this on the connection, or lose it; never wait."""

    header: Header
    message: Message
    blobs: tuple[bytes, ...] = ()


class Wake(msgspec.Struct, frozen=True):
    """Say Woke at this time; replaces every earlier Wake.  Absent: no need to."""

    at_ns: int | None


class Answer(msgspec.Struct, frozen=True):
    """What a call came to; exactly one for each call that was not forgotten."""

    call: int
    message: Message
    """The answer, or Failed."""
    blobs: tuple[bytes, ...] = ()


class StreamRow(msgspec.Struct, frozen=True):
    """The next text of a stream, each byte and each score exactly once; with an end: the last."""

    stream: bytes
    text: str
    until: int
    """UTF-8 bytes of the stream up to and including this row."""
    tokens: int
    """Generated tokens up to and including this row."""
    end: StreamEnd | None = None
    scores: list[TextScore] | None = None
    prompt_scores: list[TextScore] | None = None


class StreamFailed(msgspec.Struct, frozen=True):
    """This stream will bring no more, not even an end."""

    stream: bytes
    kind: ErrorKind
    detail: str


class Arrived(msgspec.Struct, frozen=True):
    """A message that answers nothing of ours: a request to a service, a row of its work."""

    header: Header
    message: Message
    blobs: tuple[bytes, ...] = ()


class Welcomed(msgspec.Struct, frozen=True):
    """The session is up (again); a service announces itself anew."""

    welcome: Welcome


class Lost(msgspec.Struct, frozen=True):
    """The session was up and is no more; it comes back by itself."""


class Fatal(msgspec.Struct, frozen=True):
    """The kernel will never talk to this session."""

    kind: ErrorKind
    detail: str


Effect = Send | Wake | Answer | StreamRow | StreamFailed | Arrived | Welcomed | Lost | Fatal
