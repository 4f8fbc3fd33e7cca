"""The streams of one session: which are open, what came, what the caller took, what must be said
about it.

Decides; the session sends. Text comes at most once to the caller; what is missing or silent for too
long is named, so that the session asks for it; what was consumed is acknowledged lazily, many
streams in one message.
"""

from typing import Final

from llmproto import limits
from llmproto.base import Message
from llmproto.connection import Failed
from llmproto.errors import ErrorKind
from llmproto.generation import Accepted, Attach, Attached, Generate, StreamAcked, Text

from libllm.events import Consumed, Effect, Open, Resume, StreamFailed
from libllm.requests import MS
from libllm.streams import Finished, FinishedStreams, Gap, Stream, rows_of
from libllm.timers import Timer, Timers

ACK: Final = Timer("ack")
SILENT_DOUBLINGS_MAX: Final = 3
"""A stream whose sink has nothing new is asked for less and less often, up to 8 x
STREAM_SILENT_MS."""


def stream_id(key: bytes, index: int) -> bytes:
    """The stream of one choice of a request."""
    return key + bytes((index,))


class Listening:
    """All streams that somebody on this session reads from.

    Invariant: an open stream is not finished; a stream with a silence timer is accepted and has not
    ended.
    """

    def __init__(self, timers: Timers) -> None:
        self._timers = timers
        self._streams: dict[bytes, Stream] = {}
        self._finished = FinishedStreams()
        self._unacked: dict[bytes, bool] = {}
        """Streams with something to acknowledge, and whether it is their end."""
        self._is_urgent = False

    def __len__(self) -> int:
        return len(self._streams)

    def find(self, stream: bytes) -> Stream | None:
        """An open stream."""
        return self._streams.get(stream)

    def all(self) -> list[tuple[bytes, Stream]]:
        """Every open stream, oldest first."""
        return list(self._streams.items())

    def check(self) -> None:
        """Assert the invariants in full."""
        for name, stream in self._streams.items():
            assert stream.consumed_offset <= stream.offset, name
            assert stream.consumed_tokens <= stream.tokens, name
            assert self._finished.find(name) is None, name
            if self._timers.is_set(Timer("silent", name)):
                assert stream.accepted and not stream.ended, name
            elif stream.accepted:
                assert stream.ended, name

    # --- opening and closing ----------------------------------------------------------------------

    def open(self, event: Open) -> None:
        """Listen for every choice of a request that was just made."""
        generate = event.generate
        sampling = generate.sampling
        for index in range(generate.choices):
            stream = Stream(
                wants_prompt_scores=sampling.prompt_logprobs and sampling.logprobs is not None
            )
            stream.resumable = generate.resumable
            stream.tenant = event.tenant
            stream.deadline_ns = event.deadline_ns
            self._streams[stream_id(generate.key, index)] = stream

    def resume(self, event: Resume) -> bool:
        """Listen to a stream that exists; False: it is open here already."""
        if event.stream in self._streams:
            return False
        stream = Stream(offset=event.offset, scores=event.scores, wants_prompt_scores=False)
        stream.resumable = True
        stream.tenant = event.tenant
        stream.deadline_ns = event.deadline_ns
        self._finished.drop(event.stream)
        self._streams[event.stream] = stream
        return True

    def opened(self, now_ns: int, generate: Generate, answer: Message) -> list[bytes]:
        """The request was answered; gives the threads that nobody wants any more."""
        if not isinstance(answer, Accepted):
            self.drop_request(generate)
            return []
        unwanted = []
        for index, thread in enumerate(answer.threads[: generate.choices]):
            name = stream_id(generate.key, index)
            stream = self._streams.get(name)
            finished = self._finished.find(name)
            if stream is not None:
                self._begin(now_ns, name, stream, thread)
            elif finished is not None and finished.cancelled:
                unwanted.append(thread)
        return unwanted

    def attached(self, now_ns: int, name: bytes, answer: Message) -> bytes | StreamFailed | None:
        """An Attach was answered: gives a thread that nobody wants any more, or why the stream is
        over."""
        stream = self._streams.get(name)
        if stream is None:
            finished = self._finished.find(name)
            unwanted = finished is not None and finished.cancelled
            return answer.thread if unwanted and isinstance(answer, Attached) else None
        stream.attaching = None
        if isinstance(answer, Attached):
            if answer.offset > stream.offset:
                stream.silences = 0
            if not stream.ended:
                self._begin(now_ns, name, stream, answer.thread)
            return None
        self.drop(name)
        if isinstance(answer, Failed):
            return StreamFailed(name, answer.kind, answer.detail)
        return StreamFailed(name, ErrorKind.INTERNAL, f"Attach answered by {type(answer).__name__}")

    def close(self, now_ns: int, name: bytes, *, cancel: bool) -> bytes | None:
        """Nobody listens any more; with `cancel` gives the thread to cancel, where it is known and
        lives."""
        stream = self._streams.get(name)
        if stream is None:
            return None
        self.drop(name)
        if not cancel:
            return None
        self._finish(now_ns, name, stream, cancelled=not stream.ended)
        return None if stream.ended else stream.thread

    def drop(self, name: bytes) -> None:
        """Forget the stream; its thread is somebody else's business."""
        if self._streams.pop(name, None) is not None:
            self._timers.drop(Timer("silent", name))
            self._timers.drop(Timer("stream", name))
            self._unacked.pop(name, None)

    def drop_request(self, generate: Generate) -> None:
        """Forget every stream of a request."""
        for index in range(generate.choices):
            self.drop(stream_id(generate.key, index))

    def give_up(self, now_ns: int, generate: Generate) -> None:
        """Close every stream of a request of which it is unknown whether it was accepted."""
        for index in range(generate.choices):
            self.close(now_ns, stream_id(generate.key, index), cancel=True)

    def _begin(self, now_ns: int, name: bytes, stream: Stream, thread: bytes) -> None:
        stream.thread = thread
        stream.accepted = not stream.ended
        if stream.accepted:
            self._heard(now_ns, name, stream)
        if stream.deadline_ns is not None and not stream.ended:
            self._timers.set(Timer("stream", name), stream.deadline_ns)

    def _finish(self, now_ns: int, name: bytes, stream: Stream, *, cancelled: bool) -> None:
        finished = Finished(now_ns, stream.offset, stream.tokens, cancelled)
        self._finished.add(name, finished)
        self._must_ack(now_ns, name, ended=True)

    # --- what comes -------------------------------------------------------------------------------

    def text(self, now_ns: int, message: Text) -> tuple[list[Effect], list[bytes]]:
        """New rows for the callers, and the streams that must be asked for."""
        effects: list[Effect] = []
        missing: list[bytes] = []
        for row in rows_of(message):
            stream = self._streams.get(row.stream)
            if stream is None:
                self._ended_again(now_ns, row.stream, ended=row.end is not None)
                continue
            match stream.take(row):
                case Gap.MISSING:
                    missing.append(row.stream)
                case Gap.KNOWN:
                    pass
                case Gap.BROKEN:
                    detail = f"the sink's row at byte {row.offset} contradicts its earlier text"
                    effects.append(StreamFailed(row.stream, ErrorKind.INTERNAL, detail))
                    self.drop(row.stream)
                case taken:
                    effects.append(taken)
                    stream.silences = 0
                    if stream.ended:
                        stream.accepted = False
                        self._timers.drop(Timer("silent", row.stream))
                        self._timers.drop(Timer("stream", row.stream))
                    elif stream.accepted:
                        self._heard(now_ns, row.stream, stream)
        return effects, missing

    def _ended_again(self, now_ns: int, name: bytes, *, ended: bool) -> None:
        """The acknowledgement of an end was lost: say it again."""
        if ended and self._finished.find(name) is not None:
            self._must_ack(now_ns, name, ended=True)

    def _heard(self, now_ns: int, name: bytes, stream: Stream) -> None:
        wait_ms = limits.STREAM_SILENT_MS << min(stream.silences, SILENT_DOUBLINGS_MAX)
        self._timers.set(Timer("silent", name), now_ns + wait_ms * MS)

    def silent(self, now_ns: int, name: bytes) -> None:
        """Nothing came for long: wait longer the next time."""
        stream = self._streams[name]
        stream.silences += 1
        if stream.consumed_tokens:
            # The silence may be the kernel's, which waits for an acknowledgement that was lost.
            self._must_ack(now_ns, name, ended=False)
        self._heard(now_ns, name, stream)

    def attach(self, name: bytes, request_id: bytes) -> Attach | None:
        """The question for the rest of a stream, under that request id; None: it is asked already,
        or pointless."""
        stream = self._streams.get(name)
        if stream is None or stream.ended or stream.attaching is not None:
            return None
        stream.attaching = request_id
        return Attach(name, stream.offset, stream.scores)

    def fail_all(self, kind: ErrorKind, detail: str) -> list[Effect]:
        """No stream will bring any more, but for those that have ended already."""
        failed = [name for name, stream in self._streams.items() if not stream.ended]
        for name in failed:
            self.drop(name)
        return [StreamFailed(name, kind, detail) for name in failed]

    # --- acknowledgements -------------------------------------------------------------------------

    def consumed(self, now_ns: int, event: Consumed) -> None:
        """The caller took a row."""
        stream = self._streams.get(event.stream)
        if stream is None:
            return
        stream.consume(event.until, event.tokens)
        if event.ended:
            self.drop(event.stream)
            self._finish(now_ns, event.stream, stream, cancelled=False)
            return
        self._must_ack(now_ns, event.stream, ended=False)
        self._is_urgent = self._is_urgent or stream.is_urgent

    def must_ack_all(self, now_ns: int) -> None:
        """The sink, or what it heard, may be gone: say it all again."""
        for name, stream in self._streams.items():
            if stream.consumed_tokens:
                self._must_ack(now_ns, name, ended=False)
        for name in self._finished.all():
            self._must_ack(now_ns, name, ended=True)

    def acks(self, *, urgent_only: bool) -> StreamAcked | None:
        """What is to be acknowledged, all together; with `urgent_only` nothing while there is
        time."""
        if not self._unacked or (urgent_only and not self._is_urgent):
            return None
        message = StreamAcked([], [], [], [])
        for name, ended in self._unacked.items():
            stream = self._streams.get(name)
            finished = self._finished.find(name)
            if stream is not None:
                stream.acked_tokens = tokens = stream.consumed_tokens
                offset = stream.consumed_offset
            elif finished is not None:
                offset, tokens = finished.offset, finished.tokens
            else:
                continue
            message.streams.append(name)
            message.offsets.append(offset)
            message.tokens.append(tokens)
            message.ended.append(ended)
        self._unacked.clear()
        self._is_urgent = False
        self._timers.drop(ACK)
        return message if message.streams else None

    def _must_ack(self, now_ns: int, name: bytes, *, ended: bool) -> None:
        self._unacked[name] = ended
        if not self._timers.is_set(ACK):
            self._timers.set(ACK, now_ns + limits.ACK_MS * MS)
