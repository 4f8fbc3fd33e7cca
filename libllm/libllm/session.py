"""The session of one peer with the kernel: pure, driven by events, answering with effects.

Owns the connection's state, the requests and the streams. Knows neither sockets nor clocks: time
comes as an argument, ids from the generator of random numbers that it was given. A caller of a
session never sees a crash of the system: connections are made anew, requests repeated, streams
asked for again; what it does see is deadlines and typed refusals.
"""

import random
from collections.abc import Callable
from enum import Enum
from typing import Final, assert_never

from llmproto import limits
from llmproto.base import Header, Message
from llmproto.connection import Beat, Failed, Goodbye, Hello, Unknown, Welcome
from llmproto.errors import ErrorKind
from llmproto.generation import Generate, Text
from llmproto.kinds import kind_of
from llmproto.threads import ThreadCancel

from libllm.events import (
    Answer,
    Arrived,
    Call,
    Close,
    Connected,
    Consumed,
    Disconnected,
    Effect,
    Event,
    Fatal,
    Forget,
    Holding,
    Leave,
    Lost,
    MessageArrived,
    Open,
    Post,
    Resume,
    Send,
    SendRefused,
    StreamFailed,
    Wake,
    Welcomed,
    Woke,
)
from libllm.listening import Listening
from libllm.requests import MS, Purpose, Request, Requests, request_header
from libllm.timers import Timer, Timers

HELLO_RETRY_MS: Final = 100
HELLO_RETRY_MS_MAX: Final = 2_000
HELLO: Final = Timer("hello")
BEAT: Final = Timer("beat")
LAST_REFUSAL_CHARACTERS: Final = 400
"""As much of it as people read."""
SINK: Final = "tokenizer"
"""Who serves the streams of Generate."""
HELLO_REPEATABLE: Final = (ErrorKind.EXHAUSTED, ErrorKind.UNAVAILABLE, ErrorKind.INTERNAL)


class State(Enum):
    """Where the session stands."""

    DOWN = "down"
    GREETING = "greeting"
    """Connected; Hello was said, Welcome not heard."""
    UP = "up"
    OVER = "over"
    """It left, or was refused for good."""


class Session:
    """One peer's side of the protocol.

    Invariant: nothing but Hello is sent before Welcome; every call is answered exactly once unless
    it is forgotten.
    """

    def __init__(
        self, hello: Hello, ids: random.Random, *, holding: Callable[[], Holding] = Holding
    ) -> None:
        """`hello` is said on every connection; `holding` is asked for what each Beat tells."""
        self.state = State.DOWN
        self.epoch = 0
        """Of the kernel that welcomed this session last."""
        self.tenant: int | None = None
        self._hello = hello
        self._hello_id = b""
        self._hello_wait_ms = HELLO_RETRY_MS
        self._beat_ms = limits.BEAT_MS
        self._ids = ids
        self._holding = holding
        self._timers = Timers()
        self._requests = Requests(self._timers)
        self._listening = Listening(self._timers)
        self._wake_ns: int | None = None
        self._effects: list[Effect] = []

    def handle(self, now_ns: int, event: Event) -> list[Effect]:
        """Take one event, change state, return what the shell must now do, in order."""
        effects: list[Effect] = []
        self._effects = effects
        match event:
            case MessageArrived():
                self._arrived(now_ns, event)
            case Consumed():
                self._listening.consumed(now_ns, event)
                self._say_acks(urgent_only=True)
            case Post():
                if self.state is State.UP:
                    self._post(event)
            case Woke():
                self._wake_ns = now_ns  # The shell has no timer now: what is next is said again.
                self._woke(now_ns)
            case Call():
                self._call(now_ns, event)
            case Open():
                self._open(now_ns, event)
            case Resume():
                self._resume(now_ns, event)
            case Close():
                self._close(now_ns, event.stream, cancel=event.cancel)
            case Forget():
                self._forget(now_ns, event.call)
            case Connected():
                if self.state is not State.OVER:
                    self._greet(now_ns)
            case Disconnected():
                self._disconnected()
            case SendRefused():
                self._send_refused(now_ns, event)
            case Leave():
                self._leave(now_ns, event)
            case _:
                assert_never(event)
        wake_ns = self._timers.next_ns()
        if wake_ns != self._wake_ns:
            self._wake_ns = wake_ns
            effects.append(Wake(wake_ns))
        return effects

    def check(self) -> None:
        """Assert the invariants in full."""
        self._timers.check()
        self._requests.check()
        self._listening.check()
        assert self._timers.is_set(BEAT) == (self.state is State.UP)
        assert self._timers.is_set(HELLO) == (self.state is State.GREETING)

    @property
    def requests_outstanding(self) -> int:
        """Calls and the session's own questions that have no answer."""
        return len(self._requests)

    @property
    def streams_open(self) -> int:
        """Streams somebody listens to."""
        return len(self._listening)

    # --- the connection ---------------------------------------------------------------------------

    def _greet(self, now_ns: int) -> None:
        """Say Hello, and until Welcome nothing else."""
        self._down()
        self.state = State.GREETING
        self._hello_id = self._new_id()
        self._hello_wait_ms = HELLO_RETRY_MS
        self._say_hello(now_ns)

    def _say_hello(self, now_ns: int) -> None:
        header = request_header(self._hello, self._hello_id, target="kernel")
        self._effects.append(Send(header, self._hello))
        self._timers.set(HELLO, now_ns + self._hello_wait_ms * MS)
        self._hello_wait_ms = min(2 * self._hello_wait_ms, HELLO_RETRY_MS_MAX)

    def _welcomed(self, now_ns: int, welcome: Welcome) -> None:
        """Up: say what is held, then everything that may have been lost."""
        self._timers.drop(HELLO)
        self._hello_id = b""
        self.state = State.UP
        self.epoch = welcome.kernel_epoch
        self.tenant = welcome.tenant
        self._beat_ms = welcome.beat_ms
        self._beat(now_ns)
        self._effects.append(Welcomed(welcome))
        for request in self._requests.all():
            self._send_request(now_ns, request)
        for name, stream in self._listening.all():
            if stream.accepted:
                self._attach(now_ns, name)
        self._listening.must_ack_all(now_ns)
        self._say_acks(urgent_only=False)

    def _beat(self, now_ns: int) -> None:
        held = self._holding()
        self._post(Post(Beat(held.progress, held.threads, held.positions)))
        self._timers.set(BEAT, now_ns + self._beat_ms * MS)

    def _disconnected(self) -> None:
        if self.state is not State.OVER:
            self._down()
            self.state = State.DOWN

    def _down(self) -> None:
        """What was on its way is lost."""
        if self.state is State.UP:
            self._effects.append(Lost())
        self._timers.drop(HELLO)
        self._timers.drop(BEAT)
        self._hello_id = b""
        self._requests.pause()
        detail = "the connection was lost before the answer: it may have been done or not"
        for request in self._requests.all():
            if request.once and request.was_sent:
                self._end_request(request, Failed(ErrorKind.UNAVAILABLE, detail))

    def _over(self, kind: ErrorKind, detail: str) -> None:
        """Nothing will ever come again: whoever waits is told."""
        self._down()
        self.state = State.OVER
        for request in self._requests.all():
            self._end_request(request, Failed(kind, detail))
            if isinstance(request.message, Generate):
                self._listening.drop_request(request.message)
        self._effects.extend(self._listening.fail_all(kind, detail))

    def _leave(self, now_ns: int, event: Leave) -> None:
        if self.state is State.UP:
            for _, stream in self._listening.all():
                if stream.accepted and stream.thread is not None and not stream.resumable:
                    self._post(Post(ThreadCancel(stream.thread), tenant=stream.tenant))
            self._say_acks(urgent_only=False)
            self._post(Post(Goodbye("draining" if event.draining else "done")))
        self._over(ErrorKind.UNAVAILABLE, "this connection to the system was closed")

    # --- what comes in ----------------------------------------------------------------------------

    def _arrived(self, now_ns: int, event: MessageArrived) -> None:
        if self.state is State.OVER:
            return
        header, message = event.header, event.message
        if isinstance(message, Text):
            effects, missing = self._listening.text(now_ns, message)
            self._effects.extend(effects)
            for stream in missing:
                self._attach(now_ns, stream)
        elif isinstance(message, Unknown):
            if self.state is State.UP:
                self._greet(now_ns)
        elif header.reply_to is not None:
            self._answered(now_ns, header.reply_to, message, event.blobs)
        elif isinstance(message, Goodbye):
            if message.reason == "replaced":
                self._give_up(ErrorKind.STALE, "another incarnation of this process took its place")
        else:
            self._effects.append(Arrived(header, message, event.blobs))

    def _answered(
        self, now_ns: int, reply_to: bytes, message: Message, blobs: tuple[bytes, ...]
    ) -> None:
        if self.state is State.GREETING and reply_to == self._hello_id:
            self._hello_answered(now_ns, message)
            return
        request = self._requests.find(reply_to)
        if request is None:
            return  # A second answer, to a copy of a request.
        if isinstance(message, Failed):
            wait_ms = request.wait_ms(message)
            if wait_ms is not None:
                self._requests.wait(request, now_ns + wait_ms * MS)
                return
        self._finish_request(now_ns, request, message, blobs)

    def _finish_request(
        self, now_ns: int, request: Request, message: Message, blobs: tuple[bytes, ...] = ()
    ) -> None:
        """Its answer has come, or will never come and this says why."""
        self._end_request(request, message, blobs)
        match request.purpose:
            case Purpose.OPEN:
                assert isinstance(request.message, Generate)
                for thread in self._listening.opened(now_ns, request.message, message):
                    self._cancel(now_ns, thread, request.header.tenant)
            case Purpose.ATTACH:
                outcome = self._listening.attached(now_ns, request.stream, message)
                if isinstance(outcome, bytes):
                    self._cancel(now_ns, outcome, request.header.tenant)
                elif outcome is not None and request.call is None:
                    self._effects.append(outcome)
            case Purpose.CALL | Purpose.CANCEL:
                pass
            case _:
                assert_never(request.purpose)

    def _hello_answered(self, now_ns: int, message: Message) -> None:
        if isinstance(message, Welcome):
            self._welcomed(now_ns, message)
        elif isinstance(message, Failed):
            if message.kind in HELLO_REPEATABLE:
                wait_ms = max(message.retry_after_ms or 0, self._hello_wait_ms)
                self._timers.set(HELLO, now_ns + wait_ms * MS)
            else:
                self._give_up(message.kind, message.detail)

    def _give_up(self, kind: ErrorKind, detail: str) -> None:
        self._over(kind, detail)
        self._effects.append(Fatal(kind, detail))

    def _send_refused(self, now_ns: int, event: SendRefused) -> None:
        request = self._requests.find(event.id)
        if request is not None:
            self._finish_request(now_ns, request, Failed(event.kind, event.detail))
        elif event.reply_to is not None and self.state is State.UP:
            refusal = Failed(event.kind, event.detail)
            self._post(Post(refusal, peer=event.peer, reply_to=event.reply_to))

    # --- time -------------------------------------------------------------------------------------

    def _woke(self, now_ns: int) -> None:
        for timer in self._timers.take_due(now_ns):
            match timer.what:
                case "beat":
                    self._beat(now_ns)
                case "hello":
                    self._say_hello(now_ns)
                case "request":
                    self._request_due(now_ns, timer.whose)
                case "silent":
                    self._listening.silent(now_ns, timer.whose)
                    if self.state is State.UP:
                        self._attach(now_ns, timer.whose)
                case "stream":
                    detail = "the caller's deadline passed before the stream's end"
                    self._effects.append(StreamFailed(timer.whose, ErrorKind.DEADLINE, detail))
                    self._close(now_ns, timer.whose, cancel=True)
                case "ack":
                    self._say_acks(urgent_only=False)
                case _:
                    raise AssertionError(timer)

    def _request_due(self, now_ns: int, request_id: bytes) -> None:
        request = self._requests.find(request_id)
        assert request is not None, request_id
        if request.deadline_ns is None or now_ns < request.deadline_ns:
            if self.state is State.UP and not (request.once and request.was_sent):
                self._send_request(now_ns, request)
            else:
                self._requests.pause_one(request)
            return
        why = f"; the last refusal: {request.why}"[:LAST_REFUSAL_CHARACTERS] if request.why else ""
        failed = Failed(ErrorKind.DEADLINE, "no answer came before the caller's deadline" + why)
        if request.purpose is Purpose.OPEN and request.call is not None:
            self._effects.append(Answer(request.call, failed))
            self._give_up_open(now_ns, request)
        else:
            self._finish_request(now_ns, request, failed)

    # --- the caller -------------------------------------------------------------------------------

    def _call(self, now_ns: int, event: Call) -> None:
        header = request_header(
            event.message,
            self._new_id(),
            target=event.target,
            peer=event.peer,
            cause=event.cause,
            tenant=event.tenant,
            blobs=event.blobs,
        )
        request = Request(header, event.message, Purpose.CALL, call=event.call)
        request.blobs = event.blobs
        request.deadline_ns = event.deadline_ns
        request.once = event.once
        request.wait_exhausted = event.wait_exhausted
        self._ask(now_ns, request)

    def _open(self, now_ns: int, event: Open) -> None:
        header = request_header(event.generate, self._new_id(), target=SINK, tenant=event.tenant)
        request = Request(header, event.generate, Purpose.OPEN, call=event.call)
        request.deadline_ns = event.deadline_ns
        request.wait_exhausted = event.wait_exhausted
        if self._ask(now_ns, request):
            self._listening.open(event)

    def _resume(self, now_ns: int, event: Resume) -> None:
        if self._listening.resume(event):
            self._attach(now_ns, event.stream, call=event.call)
        else:
            detail = "this stream is being read already, on this session"
            self._effects.append(Answer(event.call, Failed(ErrorKind.INVALID, detail)))

    def _attach(self, now_ns: int, name: bytes, *, call: int | None = None) -> None:
        """Ask for a stream from where it stands, unless that was asked and not answered."""
        request_id = self._new_id()
        message = self._listening.attach(name, request_id)
        stream = self._listening.find(name)
        if message is None or stream is None:
            return
        header = request_header(message, request_id, target=SINK, tenant=stream.tenant)
        request = Request(header, message, Purpose.ATTACH, call=call, stream=name)
        if call is not None:
            request.deadline_ns = stream.deadline_ns
        if not self._ask(now_ns, request):
            stream.attaching = None
            if call is not None:
                self._listening.drop(name)

    def _cancel(self, now_ns: int, thread: bytes, tenant: int | None) -> None:
        message = ThreadCancel(thread)
        header = request_header(message, self._new_id(), target="kernel", tenant=tenant)
        request = Request(header, message, Purpose.CANCEL)
        request.deadline_ns = now_ns + limits.LINGER_MS * MS
        self._ask(now_ns, request)

    def _forget(self, now_ns: int, call: int) -> None:
        request = self._requests.find_call(call)
        if request is None:
            return
        if request.purpose is Purpose.OPEN:
            self._give_up_open(now_ns, request)
            return
        self._requests.remove(request)
        if request.purpose is Purpose.ATTACH:
            self._listening.drop(request.stream)

    def _give_up_open(self, now_ns: int, request: Request) -> None:
        """Threads may have started unseen: ask on until that is known, then cancel them."""
        assert isinstance(request.message, Generate)
        if not request.was_sent:
            self._requests.remove(request)
            self._listening.drop_request(request.message)
            return
        self._listening.give_up(now_ns, request.message)
        self._requests.orphan(request, until_ns=now_ns + limits.LINGER_MS * MS)
        if self.state is State.UP:
            self._send_request(now_ns, request)

    def _close(self, now_ns: int, name: bytes, *, cancel: bool) -> None:
        stream = self._listening.find(name)
        if stream is None:
            return
        attaching = None if stream.attaching is None else self._requests.find(stream.attaching)
        if attaching is not None and (stream.thread is not None or not cancel):
            self._requests.remove(attaching)
        thread = self._listening.close(now_ns, name, cancel=cancel)
        if thread is not None:
            self._cancel(now_ns, thread, stream.tenant)

    # --- what goes out ----------------------------------------------------------------------------

    def _ask(self, now_ns: int, request: Request) -> bool:
        """Send it now, or once the session is up; False: it was refused, and the caller told."""
        refusal = None
        if self.state is State.OVER:
            refusal = Failed(ErrorKind.UNAVAILABLE, "this connection to the system was closed")
        elif self._requests.is_full:
            refusal = Failed(
                ErrorKind.EXHAUSTED,
                f"this session waits for {limits.REQUESTS_IN_FLIGHT_MAX} answers, the most that it "
                "may: wait for some",
                limits.REQUEST_RETRY_MS,
            )
        if refusal is not None:
            if request.call is not None:
                self._effects.append(Answer(request.call, refusal))
            return False
        self._requests.add(request)
        if self.state is State.UP:
            self._send_request(now_ns, request)
        return True

    def _send_request(self, now_ns: int, request: Request) -> None:
        self._effects.append(self._requests.send(request, now_ns, epoch=self.epoch))

    def _end_request(
        self, request: Request, message: Message, blobs: tuple[bytes, ...] = ()
    ) -> None:
        self._requests.remove(request)
        if request.call is not None:
            self._effects.append(Answer(request.call, message, blobs))

    def _say_acks(self, *, urgent_only: bool) -> None:
        if self.state is State.UP:
            message = self._listening.acks(urgent_only=urgent_only)
            if message is not None:
                self._post(Post(message, target=SINK))

    def _post(self, event: Post) -> None:
        message = event.message
        header = Header(
            version=limits.PROTOCOL_VERSION,
            kind=kind_of(message),
            id=self._new_id(),
            target=event.target,
            reply_to=event.reply_to,
            cause=event.cause,
            epoch=self.epoch,
            blobs=list(map(len, event.blobs)),
            tenant=event.tenant,
            peer=event.peer,
        )
        self._effects.append(Send(header, message, event.blobs))

    def _new_id(self) -> bytes:
        return self._ids.getrandbits(128).to_bytes(16, "big")
