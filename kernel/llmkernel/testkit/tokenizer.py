"""A sink without a tokenizer: text is what the oracle says, stops are single letters."""

from typing import Final

import msgspec
from libllm.events import Answer, Arrived, Call, Post, Welcomed
from llmproto.base import Header, Message
from llmproto.connection import Failed
from llmproto.errors import ErrorKind
from llmproto.generation import (
    Accepted,
    Attach,
    Attached,
    Generate,
    Sampling,
    StreamAcked,
    StreamEnd,
    Text,
)
from llmproto.init import Child
from llmproto.models import ModelAdd, ModelAdded, ModelAsk, ModelFound, ModelRegister
from llmproto.operation import ProcessStarted
from llmproto.threads import (
    Committed,
    Done,
    SinkAcked,
    SinkDrop,
    SinkOpen,
    ThreadAdopt,
    ThreadCancel,
    ThreadEnd,
    ThreadSpawn,
    ThreadSpawned,
)
from llmproto.wire import pack_tokens, unpack_tokens

from libllm import events as session_events
from llmkernel.testkit.oracle import BITTER, piece
from llmkernel.testkit.rig import MODEL, MS
from llmkernel.testkit.store import NAME, entry
from llmkernel.testkit.world import SIGSEGV, Process, World

REASONS: Final = {1: "stop", 2: "length", 3: "cancel", 4: "error"}
SPAWN_MS: Final = 10_000
MODELS: Final = (MODEL, msgspec.structs.replace(MODEL, name="o", digest=b"o" * 16))
"""What it puts into the model table."""
BOOT_MS: Final = 10


class Sink:
    """The text of one thread, a function of its ids."""

    __slots__ = (
        "acked",
        "end",
        "lengths",
        "next",
        "prompt_tokens",
        "session",
        "stop",
        "stream",
        "tenant",
        "text",
        "thread",
    )

    def __init__(
        self, thread: bytes, state: bytes, *, session: bytes, tenant: int, prompt_tokens: int
    ) -> None:
        self.thread = thread
        self.stream = state[:17]
        self.stop = state[17:].decode()
        self.session = session
        self.tenant = tenant
        self.prompt_tokens = prompt_tokens
        self.next = prompt_tokens
        self.text = b""
        self.lengths: list[int] = []
        """Of the stream after each generated token."""
        self.end: StreamEnd | None = None
        self.acked = 0

    @property
    def position(self) -> int:
        """What the Beat says: the last position received, one more with the end."""
        return self.next - (0 if self.end is not None else 1)

    @property
    def stopped(self) -> bool:
        """By a stop string, which only the sink sees."""
        return self.end is not None and self.end.stop is not None

    def push(self, position: int, token: int | None, end: int, error: str = "") -> bool:
        """Take the next row; False: it is not the next one, or nothing follows."""
        if self.end is not None or position != self.next:
            return False
        stopped = False
        if token is not None:
            said = piece(token)
            if self.stop and self.stop in said:
                said, stopped = said[: said.index(self.stop)], True
            self.text += said.encode()
            self.lengths.append(len(self.text))
            self.next += 1
        if stopped or end:
            kind, _, detail = error.partition(": ")
            self.end = StreamEnd(
                "stop" if stopped else REASONS[end],
                self.next - self.prompt_tokens,
                self.prompt_tokens,
                stop=self.stop if stopped else None,
                error=ErrorKind(kind) if kind and not stopped else None,
                detail=detail,
            )
        return True


class Asking:
    """A Generate that is being accepted."""

    def __init__(self, header: Header, generate: Generate) -> None:
        self.header = header
        self.generate = generate
        self.threads: dict[int, bytes] = {}
        self.failed = False
        self.model: str | None = None
        """What its deployment serves."""


class FakeTokenizer(Process):
    """The sink of every thread; knows only what it was told since it started."""

    def __init__(self, world: World, child: Child) -> None:
        super().__init__(world, child)
        self.by_thread: dict[bytes, Sink] = {}
        self.by_stream: dict[bytes, Sink] = {}
        self.asking: dict[bytes, Asking] = {}
        self.calls = 0
        self.waiting: dict[int, tuple[str, Asking | Header, int, Message]] = {}
        self.progress = 0
        self.started = False
        self.registered = 0
        world.after(BOOT_MS, self._start)

    def holding(self) -> session_events.Holding:
        """Its threads."""
        sinks = self.by_thread.values()
        return session_events.Holding(
            self.progress, [s.thread for s in sinks], [s.position for s in sinks]
        )

    def say(
        self, message: Message, *, peer: bytes | None = None, reply_to: bytes | None = None
    ) -> None:
        """Say it once."""
        self.feed(Post(message, peer=peer, reply_to=reply_to))

    def _ask(
        self,
        message: Message,
        what: tuple[str, Asking | Header, int, Message],
        cause: bytes,
        *,
        insist: bool = False,
    ) -> None:
        self.calls += 1
        self.waiting[self.calls] = what
        deadline_ns = self.world.now_ns + SPAWN_MS * MS
        self.feed(
            Call(
                self.calls,
                message,
                cause=cause or None,
                deadline_ns=deadline_ns if cause else None,
                wait_exhausted=insist or not cause,
            )
        )

    def _start(self) -> None:
        for model in MODELS:
            self._ask(
                ModelRegister(model, default=model is MODEL), ("model", _NOBODY, 0, Done()), b""
            )

    def took(self, effect: session_events.Effect) -> None:
        """Announce itself; serve."""
        if isinstance(effect, Welcomed):
            if self.started:
                self.say(ProcessStarted())
        elif isinstance(effect, Arrived):
            self._told(effect.header, effect.message)
        elif isinstance(effect, Answer):
            self._answered(effect)

    def _told(self, header: Header, message: Message) -> None:
        match message:
            case Generate():
                self._generate(header, message)
            case Committed():
                self._committed(message)
            case SinkOpen():
                self._open(message)
            case SinkDrop():
                for thread in message.threads:
                    self._drop(thread)
            case StreamAcked():
                self._acked(message)
            case Attach():
                self._attach(header, message)
            case ModelAdd():
                self._add(header, message)
            case _:
                raise AssertionError(message)

    # --- requests ---------------------------------------------------------------------------------

    def _generate(self, header: Header, generate: Generate) -> None:
        if header.id in self.asking:
            return
        self.progress += 1
        if (generate.prompt_tokens or [0])[0] == BITTER:
            self.world.signal(self.child.pid, SIGSEGV)
            return
        asking = self.asking[header.id] = Asking(header, generate)
        self._find(asking, 0)

    def _find(self, asking: Asking, index: int) -> None:
        """What the name of a deployment stands for now."""
        if asking.generate.model != NAME:
            self._spawn(asking, index)
            return
        ask = ModelAsk(NAME)
        self._ask(ask, ("find", asking, index, ask), asking.header.id)

    def _add(self, header: Header, add: ModelAdd) -> None:
        assert add.name is not None
        register = ModelRegister(entry(add.name))
        self._ask(register, ("add", header, 0, register), b"")

    def _spawn(self, asking: Asking, index: int) -> None:
        """The first choice alone decides whether the request is accepted: once it is, the others
        are insisted on, for no thread whose text may have been read can be taken back."""
        header, generate = asking.header, asking.generate
        assert generate.output_tokens_max is not None
        spawn = ThreadSpawn(
            key=generate.key,
            index=index,
            digest=generate.key[::-1],
            model=asking.model or generate.model or MODEL.name,
            deployment=NAME if asking.model else None,
            tokens=pack_tokens(generate.prompt_tokens or []),
            output_tokens_max=generate.output_tokens_max,
            sampling=Sampling(temperature=0.0, seed=generate.sampling.seed + index),
            sink_state=generate.key + bytes((index,)) + "".join(generate.stops).encode(),
            deadline_ms=header.deadline_ms,
            resumable=generate.resumable,
        )
        self._ask(spawn, ("spawn", asking, index, spawn), header.id, insist=index > 0)

    def _answered(self, effect: Answer) -> None:
        what, whose, index, asked = self.waiting.pop(effect.call)
        answer = effect.message
        if what == "model":
            self.registered += 1
            if self.registered < len(MODELS):
                return
            self.started = True
            self.progress = max(1, self.progress)
            self.say(ProcessStarted())
        elif what == "add":
            assert isinstance(whose, Header) and isinstance(asked, ModelRegister)
            added = ModelAdded(asked.model.name, asked.model.digest)
            answer = answer if isinstance(answer, Failed) else added
            self.say(answer, peer=whose.source, reply_to=whose.id)
        elif what == "find":
            assert isinstance(whose, Asking)
            if isinstance(answer, ModelFound):
                whose.model = answer.model.name
                self._spawn(whose, index)
            else:
                self._refuse(whose, answer)
        elif what == "adopt":
            assert isinstance(whose, Header) and isinstance(asked, Attach)
            sink = self.by_stream.get(asked.stream)
            if isinstance(answer, Failed):
                self.say(answer, peer=whose.source, reply_to=whose.id)
            elif sink is not None:
                sink.session = whose.source
                self._attached(whose, asked, sink)
        else:
            assert isinstance(whose, Asking) and isinstance(asked, ThreadSpawn)
            self._spawned(whose, index, asked, answer)

    def _spawned(self, asking: Asking, index: int, spawn: ThreadSpawn, answer: Message) -> None:
        header = asking.header
        if isinstance(answer, ThreadSpawned):
            asking.threads[index] = answer.thread
            if answer.thread not in self.by_thread and not answer.existing:
                self._keep(
                    Sink(
                        answer.thread,
                        spawn.sink_state,
                        session=header.source,
                        tenant=header.tenant or 0,
                        prompt_tokens=len(spawn.tokens) // 4,
                    )
                )
            if index == 0:
                for other in range(1, asking.generate.choices):
                    self._spawn(asking, other)
            if asking.failed:
                self.say(ThreadCancel(answer.thread))
            elif len(asking.threads) == asking.generate.choices:
                self.asking.pop(header.id, None)
                threads = [asking.threads[i] for i in range(asking.generate.choices)]
                accepted = Accepted(threads, MODEL.name, len(spawn.tokens) // 4)
                self.say(accepted, peer=header.source, reply_to=header.id)
        elif isinstance(answer, Failed) and answer.kind is ErrorKind.STALE:
            self._find(asking, index)
        else:
            self._refuse(asking, answer)

    def _refuse(self, asking: Asking, answer: Message) -> None:
        if asking.failed:
            return
        asking.failed = True
        header = asking.header
        self.asking.pop(header.id, None)
        for thread in asking.threads.values():
            self.say(ThreadCancel(thread))
        self.say(answer, peer=header.source, reply_to=header.id)

    # --- tokens -----------------------------------------------------------------------------------

    def _keep(self, sink: Sink) -> None:
        self._drop(sink.thread)
        self.by_thread[sink.thread] = sink
        self.by_stream[sink.stream] = sink

    def _drop(self, thread: bytes) -> None:
        sink = self.by_thread.pop(thread, None)
        if sink is not None and self.by_stream.get(sink.stream) is sink:
            del self.by_stream[sink.stream]

    def _committed(self, rows: Committed) -> None:
        self.progress += 1
        readers: dict[bytes, list[tuple[Sink, int]]] = {}
        errors = rows.errors or [""] * len(rows.threads)
        for thread, position, token, end, error in zip(
            rows.threads, rows.positions, rows.tokens, rows.ends, errors
        ):
            sink = self.by_thread.get(thread)
            if sink is None:
                continue
            offset = len(sink.text)
            if sink.push(position, token, end, error):
                readers.setdefault(sink.session, []).append((sink, offset))
                if sink.stopped:
                    self.say(ThreadEnd(thread, sink.next - 1))
            elif sink.stopped and token is not None:
                self.say(ThreadEnd(thread, sink.next - 1))
        for session, sinks in readers.items():
            self._text(session, sinks)

    def _open(self, opened: SinkOpen) -> None:
        sink = Sink(
            opened.thread,
            opened.sink_state,
            session=opened.session,
            tenant=opened.tenant,
            prompt_tokens=opened.prompt_tokens,
        )
        tokens = unpack_tokens(opened.tokens)
        for position in range(opened.prompt_tokens, len(tokens)):
            sink.push(position, tokens[position], 0)
        if opened.end and sink.end is None:
            error = f"{opened.error.value}: {opened.detail}" if opened.error else ""
            last = opened.prompt_tokens + len(sink.lengths)
            assert last == len(tokens), (last, len(tokens))
            sink.push(last, None, opened.end, error if opened.end == 4 else "")
        sink.acked = opened.acked
        self._keep(sink)
        if sink.stopped:
            self.say(ThreadEnd(sink.thread, sink.next - 1))
        known = opened.acked - opened.prompt_tokens
        self._text(sink.session, [(sink, sink.lengths[known] if known >= 0 else 0)])

    def _text(self, session: bytes, sinks: list[tuple[Sink, int]]) -> None:
        self.say(
            Text(
                [sink.stream for sink, _ in sinks],
                [offset for _, offset in sinks],
                [sink.text[offset:].decode() for sink, offset in sinks],
                [len(sink.lengths) for sink, _ in sinks],
                [sink.end for sink, _ in sinks],
            ),
            peer=session,
        )

    # --- readers ----------------------------------------------------------------------------------

    def _acked(self, acked: StreamAcked) -> None:
        acks = SinkAcked([], [], [])
        for stream, tokens, ended in zip(acked.streams, acked.tokens, acked.ended):
            sink = self.by_stream.get(stream)
            if sink is None:
                continue
            over = ended and sink.end is not None
            position = sink.prompt_tokens + min(tokens, len(sink.lengths)) - 1
            if over:
                position = sink.next - 1
                self._drop(sink.thread)
            if over or position >= sink.acked:  # again: what was said may have been lost
                sink.acked = position
                acks.threads.append(sink.thread)
                acks.positions.append(position)
                acks.ended.append(over)
        if acks.threads:
            self.say(acks)

    def _attach(self, header: Header, attach: Attach) -> None:
        sink = self.by_stream.get(attach.stream)
        if sink is None:
            failed = Failed(ErrorKind.STALE, "this stream is not known")
            self.say(failed, peer=header.source, reply_to=header.id)
        elif sink.session != header.source:
            self._ask(ThreadAdopt(sink.thread), ("adopt", header, 0, attach), header.id)
        else:
            self._attached(header, attach, sink)

    def _attached(self, header: Header, attach: Attach, sink: Sink) -> None:
        if attach.offset > len(sink.text):
            detail = f"{attach.offset} bytes of {len(sink.text)}"
            self.say(Failed(ErrorKind.STALE, detail), peer=header.source, reply_to=header.id)
            return
        attached = Attached(sink.thread, MODEL.name, len(sink.text))
        self.say(attached, peer=header.source, reply_to=header.id)
        self._text(sink.session, [(sink, attach.offset)])


_NOBODY: Final = Header(1, 1, bytes(16))
