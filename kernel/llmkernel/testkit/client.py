"""A client of the simulated world: reads slowly, cancels, leaves, and checks every byte."""

from typing import Final

from libllm.events import (
    Answer,
    Call,
    Close,
    Consumed,
    Leave,
    Open,
    Resume,
    StreamFailed,
    StreamRow,
)
from llmproto.base import Message
from llmproto.connection import Failed, Hello
from llmproto.errors import ErrorKind
from llmproto.generation import Generate, Sampling

from libllm import events as session_events
from llmkernel.testkit.ledger import Ledger
from llmkernel.testkit.oracle import BITTER, HANGS, POISON, Twin, undisturbed
from llmkernel.testkit.rig import MS, OPERATOR_PROOF
from llmkernel.testkit.world import Node, World

READ_MS: Final = 4
ASK_MS: Final = 5_000


class Reading:
    """One stream and its undisturbed twin."""

    def __init__(self, twin: Twin, *, poisoned: bool) -> None:
        self.twin = twin
        self.poisoned = poisoned
        self.text = ""
        self.over = ""
        """Why nothing more is expected: an end's reason, or what the program did."""
        self.until = 0
        self.tokens = 0
        self.queue: list[StreamRow] = []
        self.cancelled = False
        self.stop = ""
        self.bitter = False
        """Its request kills the sink."""
        self.inherited = False
        """Of a client that died: its thread may have been cancelled before this one asked."""
        self.deadline = False

    def row(self, row: StreamRow, ledger: Ledger, *, fast: bool) -> None:
        """The next text: it is committed, it is the twin's, and it comes once."""
        assert not self.over and not self.bitter, (self.over, row)
        self.text += row.text
        committed = ledger.text(row.stream, self.stop)
        assert committed.startswith(self.text), (self.text, committed)
        assert fast or self.twin.text.startswith(self.text), (self.text, self.twin.text)
        assert len(self.text.encode()) == row.until
        if row.end is None:
            return
        self.over = row.end.reason
        if row.end.reason == "cancel":
            assert self.cancelled or self.inherited, row.end
        elif self.poisoned and not (fast and row.end.error is None):
            assert row.end.error is ErrorKind.INTERNAL, row.end
        elif row.end.reason == "error":
            assert self.deadline and row.end.error is ErrorKind.DEADLINE, row.end
        else:
            assert self.text == committed
            assert fast or (self.text, row.end.reason, row.end.output_tokens) == self.twin


class FakeClient(Node):
    """A program over the real session."""

    def __init__(self, world: World, *, slow: float = 1.0) -> None:
        super().__init__(world, Hello(world.random.randbytes(16), "client", OPERATOR_PROOF))
        self.slow = slow
        self.streams: dict[bytes, Reading] = {}
        self.opened: dict[int, Generate] = {}
        self.resumed: dict[int, bytes] = {}
        self.calls = 0
        self.left = False

    @property
    def done(self) -> bool:
        """Everything it asked for is over."""
        return not self.alive or (
            not self.opened
            and not self.resumed
            and all(r.over and not r.queue for r in self.streams.values())
        )

    def generate(
        self,
        prompt: list[int],
        *,
        output_tokens_max: int,
        stop: str = "",
        choices: int = 1,
        seed: int = 0,
        deadline_ms: int | None = None,
        resumable: bool = False,
        model: str | None = None,
    ) -> bytes:
        """Ask for streams; gives the request's key."""
        self.calls += 1
        key = self.world.random.randbytes(16)
        generate = Generate(
            key=key,
            model=model,
            prompt_tokens=prompt,
            output_tokens_max=output_tokens_max,
            sampling=Sampling(temperature=0.0, seed=seed),
            stops=[stop] if stop else [],
            choices=choices,
            resumable=resumable,
        )
        for index in range(choices):
            twin = undisturbed(
                prompt, seed=seed + index, output_tokens_max=output_tokens_max, stop=stop
            )
            doomed = prompt[0] in (POISON, HANGS) and (self.world.fast or twin.tokens > 2)
            reading = Reading(twin, poisoned=doomed)
            reading.deadline = deadline_ms is not None
            reading.stop = stop
            reading.bitter = prompt[0] == BITTER
            self.streams[key + bytes((index,))] = reading
        self.opened[self.calls] = generate
        deadline_ns = None if deadline_ms is None else self.world.now_ns + deadline_ms * MS
        self.feed(Open(self.calls, generate, deadline_ns=deadline_ns, wait_exhausted=True))
        return key

    def resume(self, stream: bytes, reading: Reading) -> None:
        """Go on with a stream of a client that died, from what that one had."""
        self.calls += 1
        self.resumed[self.calls] = stream
        self.streams[stream] = reading
        reading.inherited = True
        reading.queue = []
        self.feed(Resume(self.calls, stream, offset=len(reading.text.encode())))

    def leave(self) -> None:
        """An orderly end: what it reads and did not keep is cancelled."""
        self.left = True
        for reading in self.streams.values():
            reading.over = reading.over or "left"
        self.feed(Leave())
        self.world.after(5, self.die)

    def ask(self, message: Message) -> None:
        """Ask the kernel; what it says is looked at by nobody."""
        self.calls += 1
        if self.alive:
            deadline_ns = self.world.now_ns + ASK_MS * MS
            self.feed(Call(self.calls, message, deadline_ns=deadline_ns, wait_exhausted=True))

    def cancel(self, stream: bytes) -> None:
        """Stop listening, and end the thread."""
        reading = self.streams[stream]
        if not reading.over and not any(g.key == stream[:16] for g in self.opened.values()):
            reading.over = "cancelled here"
            reading.queue = []
            self.feed(Close(stream, cancel=True))

    def took(self, effect: session_events.Effect) -> None:
        """Rows and answers."""
        if self.left:
            return
        match effect:
            case StreamRow():
                reading = self.streams[effect.stream]
                reading.row(effect, self.world.ledger, fast=self.world.fast)
                reading.queue.append(effect)
                if len(reading.queue) == 1:
                    self._read_later(effect.stream)
            case Answer():
                self._answered(effect)
            case StreamFailed():
                reading = self.streams[effect.stream]
                lapsed = reading.inherited and effect.kind is ErrorKind.STALE
                assert reading.deadline or lapsed, effect
                reading.over = reading.over or "failed"
            case _:
                pass

    def _answered(self, effect: Answer) -> None:
        generate = self.opened.pop(effect.call, None)
        stream = self.resumed.pop(effect.call, None)
        if isinstance(effect.message, Failed):
            streams = [stream] if stream is not None else []
            if generate is not None:
                streams = [generate.key + bytes((i,)) for i in range(generate.choices)]
            for name in streams:
                reading = self.streams[name]
                allowed = reading.deadline and effect.message.kind is ErrorKind.DEADLINE
                late = stream is not None and effect.message.kind is ErrorKind.STALE
                bitter = reading.bitter and effect.message.kind is ErrorKind.INTERNAL
                assert allowed or late or bitter, effect
                reading.over = "failed"

    def _read_later(self, stream: bytes) -> None:
        delay_ms = READ_MS * self.slow * (0.5 + self.world.random.random())
        self.world.after(delay_ms, lambda: self._read(stream))

    def _read(self, stream: bytes) -> None:
        reading = self.streams[stream]
        if not self.alive or not reading.queue:
            return
        row = reading.queue.pop(0)
        ended = row.end is not None
        self.feed(Consumed(stream, row.until, row.tokens, ended=ended))
        if reading.queue:
            self._read_later(stream)
