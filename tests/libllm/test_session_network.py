"""A session against a sink behind a network that loses, repeats, delays and breaks: exact text,
once, to the end."""

import heapq
import random

from hypothesis import given, settings
from hypothesis import strategies as st
from libllm.events import (
    Answer,
    Connected,
    Consumed,
    Disconnected,
    Effect,
    Event,
    MessageArrived,
    Open,
    Send,
    StreamFailed,
    StreamRow,
    Wake,
    Woke,
)
from libllm.listening import stream_id
from libllm.session import Session
from llmproto.base import Header, Message
from llmproto.connection import Failed, Goodbye, Hello, Unknown, Welcome
from llmproto.errors import ErrorKind
from llmproto.generation import (
    Accepted,
    Attach,
    Attached,
    Generate,
    StreamAcked,
    StreamEnd,
    Text,
)
from llmproto.kinds import KIND_OF
from llmproto.threads import Done, ThreadCancel

MS = 1_000_000
WORDS = ["Es ", "war ", "eín", "mal ", "🙂", "", "."]
TEXT = "".join(WORDS)
REPEAT = 1_000


class World:
    """One session, one network, one kernel that is its own sink."""

    def __init__(self, seed: int, *, streams: int, trouble_ms: int) -> None:
        self.chance = random.Random(seed)
        self.trouble_ms = trouble_ms
        self.session = Session(Hello(b"s" * 16, "client"), random.Random(seed + 1))
        self.now_ms = 0
        self.wake_ms: int | None = None
        self.queue: list[tuple[int, int, Event | Send | int]] = []
        """What happens when: an event of the session, a message to the sink, or a token of a
        stream."""
        self.serial = 0
        self.connection = 0
        self.is_welcome = False
        self.epoch = 0
        self.made: dict[bytes, int] = {}
        """Tokens that exist, by stream."""
        self.acked: set[bytes] = set()
        self.got: dict[bytes, list[StreamRow]] = {}
        self.answers: list[Answer] = []
        self.keys = [bytes((number,)) * 16 for number in range(streams)]

    def run(self) -> None:
        """Until every request was answered, and every stream read and acknowledged."""
        self.at(0, Connected())
        for call, key in enumerate(self.keys):
            self.at(self.chance.randrange(500), Open(call, Generate(key=key, prompt="x")))
        for _ in range(6):
            when = self.chance.randrange(self.trouble_ms)
            self.at(when, Disconnected())
            self.at(when + self.chance.randrange(1, 300), Connected())
        while min(len(self.acked), len(self.answers)) < len(self.keys):
            self.step()
            assert self.now_ms < 600_000, "it never ends"

    def at(self, when_ms: int, what: Event | Send | int) -> None:
        """Let it happen then."""
        self.serial += 1
        heapq.heappush(self.queue, (when_ms, self.serial, what))

    def step(self) -> None:
        """The next thing that happens."""
        next_ms = self.queue[0][0] if self.queue else None
        if self.wake_ms is not None and (next_ms is None or self.wake_ms <= next_ms):
            self.now_ms, self.wake_ms = max(self.now_ms, self.wake_ms), None
            self.feed(Woke())
            return
        self.now_ms, _, what = heapq.heappop(self.queue)
        if isinstance(what, Send):
            self.kernel(what.header, what.message)
        elif isinstance(what, int) and what >= REPEAT:
            if stream_id(self.keys[what - REPEAT], 0) not in self.acked:
                self.text(stream_id(self.keys[what - REPEAT], 0), len(TEXT.encode()))
        elif isinstance(what, int):
            self.token(stream_id(self.keys[what], 0))
        else:
            if isinstance(what, Connected | Disconnected):
                self.is_welcome = False
            self.feed(what)

    def feed(self, event: Event) -> None:
        """Drive the session, and carry out what it says."""
        effects: list[Effect] = self.session.handle(self.now_ms * MS, event)
        self.session.check()
        for effect in effects:
            match effect:
                case Wake():
                    self.wake_ms = None if effect.at_ns is None else -(-effect.at_ns // MS)
                case Send():
                    self.carry(effect)
                case StreamRow():
                    self.got.setdefault(effect.stream, []).append(effect)
                    ended = effect.end is not None
                    consumed = Consumed(effect.stream, effect.until, effect.tokens, ended=ended)
                    self.at(self.now_ms + self.chance.randrange(100), consumed)
                case Answer():
                    self.answers.append(effect)
                case StreamFailed():
                    raise AssertionError(effect)
                case _:
                    pass

    def carry(self, what: Send | MessageArrived) -> None:
        """Through the network: while there is trouble, not once and not in order."""
        trouble = self.now_ms < self.trouble_ms
        copies = self.chance.choice((0, 1, 1, 1, 2)) if trouble else 1
        for _ in range(copies):
            delay_ms = self.chance.randrange(1, 200) if trouble else 1
            self.at(self.now_ms + delay_ms, what)

    # --- kernel and sink ------------------------------------------------------------------------

    def say(self, message: Message, answers: Header | None = None) -> None:
        reply_to = None if answers is None else answers.id
        header = Header(1, KIND_OF[type(message)], bytes(16), reply_to=reply_to)
        self.carry(MessageArrived(header, message))

    def kernel(self, header: Header, message: Message) -> None:
        if isinstance(message, Hello):
            self.epoch += 1
            self.is_welcome = True
            self.say(Welcome(self.epoch, bytes(16), 1, 500, message.session, 0), header)
        elif not self.is_welcome:
            self.say(Unknown(self.epoch))
        elif self.now_ms < self.trouble_ms and self.chance.random() < 0.1:
            self.say(Failed(ErrorKind.UNAVAILABLE, "restarting"), header)
        else:
            self.sink(header, message)

    def sink(self, header: Header, message: Message) -> None:
        match message:
            case Generate():
                stream = stream_id(message.key, 0)
                if stream not in self.made:
                    self.made[stream] = 0
                    for number in range(len(WORDS)):
                        self.at(self.now_ms + 50 * number + 10, self.keys.index(message.key))
                self.say(Accepted([message.key[:8]], "m", 1), header)
            case Attach():
                if message.stream not in self.made:
                    self.say(Failed(ErrorKind.UNAVAILABLE, "not yet"), header)
                    return
                self.say(Attached(message.stream[:8], "m", 0), header)
                self.text(message.stream, message.offset)
            case StreamAcked():
                for stream, ended in zip(message.streams, message.ended):
                    if ended:
                        assert self.made[stream] == len(WORDS)
                        self.acked.add(stream)
            case ThreadCancel():
                self.say(Done(), header)
            case Goodbye():
                raise AssertionError(message)
            case _:
                pass

    def token(self, stream: bytes) -> None:
        begin = len("".join(WORDS[: self.made[stream]]).encode())
        self.made[stream] += 1
        self.text(stream, begin)

    def text(self, stream: bytes, offset: int) -> None:
        """All that exists from there."""
        count = self.made[stream]
        rest = "".join(WORDS[:count]).encode()[offset:].decode()
        end = StreamEnd("length", count, 1) if count == len(WORDS) else None
        self.say(Text([stream], [offset], [rest], [count], [end]))
        if end is not None and stream not in self.acked:
            # A sink repeats an end that nobody acknowledged.
            self.at(self.now_ms + 1_000, REPEAT + self.keys.index(stream[:16]))


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**48), streams=st.integers(1, 4), trouble_ms=st.integers(1, 20_000))
def test_every_stream_ends_exact_whatever_the_network_does(
    seed: int, streams: int, trouble_ms: int
) -> None:
    world = World(seed, streams=streams, trouble_ms=trouble_ms)
    world.run()
    assert sorted(answer.call for answer in world.answers) == list(range(streams))
    assert all(isinstance(answer.message, Accepted) for answer in world.answers)
    for key in world.keys:
        rows = world.got[stream_id(key, 0)]
        assert "".join(row.text for row in rows) == TEXT
        assert [row.end is not None for row in rows] == [False] * (len(rows) - 1) + [True]
    assert world.session.streams_open == 0


def test_the_same_seed_gives_the_same_run() -> None:
    first = World(7, streams=3, trouble_ms=9_000)
    second = World(7, streams=3, trouble_ms=9_000)
    first.run()
    second.run()
    assert (first.got, first.now_ms) == (second.got, second.now_ms)
