"""The session as a table: an event, then the effects."""

import random
from typing import TypeVar

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
    StreamRow,
    Wake,
    Welcomed,
    Woke,
)
from libllm.listening import stream_id
from libllm.session import Session, State
from llmproto import limits
from llmproto.base import Header, Message
from llmproto.connection import Beat, Failed, Goodbye, Hello, Unknown, Welcome
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
from llmproto.kinds import KIND_OF
from llmproto.operation import Status, StatusAsk
from llmproto.threads import Done, ThreadCancel

MS = 1_000_000
SESSION = b"s" * 16
KEY = b"k" * 16
STREAM = stream_id(KEY, 0)
THREAD = b"t" * 8
GENERATE = Generate(key=KEY, prompt="Hi")
ACCEPTED = Accepted([THREAD], "m", 2)
END = StreamEnd("length", 2, 2)
MessageT = TypeVar("MessageT", bound=Message)
EffectT = TypeVar("EffectT")


class Driver:
    """A session, its clock, and what it said last."""

    def __init__(self, *, up: bool = True) -> None:
        self.now_ms = 0
        self.wake_ns: int | None = None
        self.effects: list[Effect] = []
        hello = Hello(SESSION, "client", b"proof")
        self.session = Session(hello, random.Random(1), holding=lambda: Holding(5, [THREAD], [9]))
        if up:
            self(Connected())
            self.welcome()

    def __call__(self, event: Event) -> list[Effect]:
        """What follows, but for Wake, which is noted."""
        effects = self.session.handle(self.now_ms * MS, event)
        self.session.check()
        for effect in effects:
            if isinstance(effect, Wake):
                self.wake_ns = effect.at_ns
            if isinstance(effect, Send) and isinstance(effect.message, Hello):
                self.hello = effect.header
        self.effects = [effect for effect in effects if not isinstance(effect, Wake)]
        return self.effects

    def welcome(self, epoch: int = 1) -> list[Effect]:
        """Answer the Hello that was said last."""
        return self.answer(self.hello, Welcome(epoch, bytes(16), 1, 500, SESSION, 3))

    def answer(self, header: Header, message: Message) -> list[Effect]:
        """Answer a request."""
        return self.arrive(message, reply_to=header.id)

    def arrive(self, message: Message, *, reply_to: bytes | None = None) -> list[Effect]:
        """A message comes in."""
        header = Header(1, KIND_OF[type(message)], random.randbytes(16), reply_to=reply_to)
        return self(MessageArrived(header, message))

    def at(self, now_ms: int) -> list[Effect]:
        """Let time pass, waking whenever that was asked for; what was done last at that time."""
        effects: list[Effect] = []
        while self.wake_ns is not None and self.wake_ns <= now_ms * MS:
            self.now_ms = max(self.now_ms, self.wake_ns // MS)
            effects += self(Woke())
        self.now_ms = now_ms
        self.effects = effects
        return effects

    def sent(self, wanted: type[MessageT]) -> tuple[Header, MessageT]:
        """The one message of this type among the last effects."""
        (found,) = self.all_sent(wanted)
        return found

    def all_sent(self, wanted: type[MessageT]) -> list[tuple[Header, MessageT]]:
        """Those of this type among the last effects."""
        return [
            (effect.header, effect.message)
            for effect in self.effects
            if isinstance(effect, Send) and isinstance(effect.message, wanted)
        ]

    def open(self, *, accept: bool = True, deadline_ms: int | None = None) -> Header:
        """Ask for a stream."""
        deadline_ns = None if deadline_ms is None else deadline_ms * MS
        self(Open(1, GENERATE, deadline_ns=deadline_ns))
        header, _ = self.sent(Generate)
        if accept:
            assert self.answer(header, ACCEPTED) == [Answer(1, ACCEPTED)]
        return header

    def text(
        self, offset: int, text: str, tokens: int, end: StreamEnd | None = None
    ) -> list[Effect]:
        """A row of the stream."""
        return self.arrive(Text([STREAM], [offset], [text], [tokens], [end]))


def only(effects: list[Effect], wanted: type[EffectT]) -> list[EffectT]:
    """Those of one type."""
    return [effect for effect in effects if isinstance(effect, wanted)]


# --- the connection ---------------------------------------------------------------------------


def test_nothing_but_hello_is_said_before_welcome() -> None:
    driver = Driver(up=False)
    assert driver(Call(1, StatusAsk())) == []
    driver(Connected())
    header, hello = driver.sent(Hello)
    assert (hello.session, header.target, len(driver.effects)) == (SESSION, "kernel", 1)
    assert driver(Post(StatusAsk())) == []
    driver.welcome()
    _, beat = driver.sent(Beat)
    assert beat == Beat(5, [THREAD], [9])
    assert len(only(driver.effects, Welcomed)) == 1
    assert len(driver.all_sent(StatusAsk)) == 1
    assert (driver.session.state, driver.session.epoch, driver.session.tenant) == (State.UP, 1, 3)


def test_hello_is_repeated_under_its_id_until_welcome() -> None:
    driver = Driver(up=False)
    driver(Connected())
    first, _ = driver.sent(Hello)
    driver.at(1_000)
    again = driver.all_sent(Hello)
    assert len(again) == 3  # after 100, 300 and 700 ms
    assert {header.id for header, _ in again} == {first.id}


def test_beats_come_at_the_interval_that_the_kernel_wants() -> None:
    driver = Driver()
    driver.at(2_000)
    assert len(driver.all_sent(Beat)) == 4


def test_waking_early_only_asks_to_be_woken_again() -> None:
    driver = Driver()
    due_ns = driver.wake_ns
    assert due_ns is not None
    assert driver.session.handle(due_ns - 1, Woke()) == [Wake(due_ns)]


def test_unknown_makes_it_say_hello_again_and_repeat_what_is_open() -> None:
    driver = Driver()
    driver(Call(1, StatusAsk()))
    header, _ = driver.sent(StatusAsk)
    assert driver.arrive(Unknown(2))[0] == Lost()
    assert driver.arrive(Unknown(2)) == []
    driver.welcome(epoch=2)
    again, _ = driver.sent(StatusAsk)
    assert (again.id, again.epoch) == (header.id, 2)


def test_a_refused_hello_is_fatal_and_answers_everybody() -> None:
    driver = Driver(up=False)
    driver(Call(1, StatusAsk()))
    driver(Open(2, GENERATE))
    driver(Connected())
    header, _ = driver.sent(Hello)
    failed = Failed(ErrorKind.DENIED, "no such key")
    effects = driver.answer(header, failed)
    assert Fatal(ErrorKind.DENIED, "no such key") in effects
    assert only(effects, Answer) == [Answer(1, failed), Answer(2, failed)]
    (late,) = only(driver(Call(3, StatusAsk())), Answer)
    assert isinstance(late.message, Failed)
    assert driver(Connected()) == []


def test_an_exhausted_hello_is_repeated() -> None:
    driver = Driver(up=False)
    driver(Connected())
    header, _ = driver.sent(Hello)
    assert driver.answer(header, Failed(ErrorKind.EXHAUSTED, "full", 5_000)) == []
    assert driver.at(4_999) == []
    assert len(driver.all_sent(Hello)) == 0
    driver.at(5_000)
    assert len(driver.all_sent(Hello)) == 1


def test_a_replaced_process_ends() -> None:
    driver = Driver()
    assert len(only(driver.arrive(Goodbye("replaced")), Fatal)) == 1


def test_what_answers_nothing_goes_to_the_owner() -> None:
    driver = Driver()
    (arrived,) = driver.arrive(StatusAsk())
    assert isinstance(arrived, Arrived) and arrived.message == StatusAsk()


# --- requests ---------------------------------------------------------------------------------


def test_an_unanswered_request_is_repeated_with_its_id_until_its_deadline() -> None:
    driver = Driver()
    driver(Call(1, StatusAsk(), deadline_ns=5_000 * MS))
    header, _ = driver.sent(StatusAsk)
    assert header.deadline_ms == 5_000
    driver.at(4_999)
    repeats = [again for again, _ in driver.all_sent(StatusAsk)]
    assert [(again.id, again.deadline_ms) for again in repeats] == [
        (header.id, 3_000),
        (header.id, 1_000),
    ]
    (answer,) = only(driver.at(5_000), Answer)
    assert isinstance(answer.message, Failed) and answer.message.kind is ErrorKind.DEADLINE
    assert driver.answer(header, Done()) == []
    assert driver.session.requests_outstanding == 0


def test_unavailable_is_retried_soon_and_ever_later() -> None:
    driver = Driver()
    driver(Call(1, StatusAsk()))
    times = []
    for _ in range(7):
        header, _ = driver.sent(StatusAsk)
        assert driver.answer(header, Failed(ErrorKind.UNAVAILABLE, "starting")) == []
        begun_ms = driver.now_ms
        while not driver.all_sent(StatusAsk):
            driver.at(driver.now_ms + 10)
        times.append(driver.now_ms - begun_ms)
    assert times == [50, 100, 200, 400, 800, 1_000, 1_000]
    header, _ = driver.sent(StatusAsk)
    status = Status(True, "1", 1, 1)
    assert driver.answer(header, status) == [Answer(1, status)]


def test_a_hint_when_to_retry_is_honoured() -> None:
    driver = Driver()
    driver(Call(1, StatusAsk(), wait_exhausted=True))
    header, _ = driver.sent(StatusAsk)
    driver.answer(header, Failed(ErrorKind.EXHAUSTED, "full", 300))
    driver.at(299)
    assert not driver.all_sent(StatusAsk)
    driver.at(300)
    assert driver.all_sent(StatusAsk)


def test_other_refusals_and_exhaustion_go_to_the_caller() -> None:
    for kind in (ErrorKind.EXHAUSTED, ErrorKind.INVALID, ErrorKind.STALE, ErrorKind.INTERNAL):
        driver = Driver()
        driver(Call(1, StatusAsk()))
        header, _ = driver.sent(StatusAsk)
        failed = Failed(kind, "no")
        assert driver.answer(header, failed) == [Answer(1, failed)]
        assert driver.answer(header, failed) == []


def test_a_request_lives_through_a_restart_of_the_kernel() -> None:
    driver = Driver()
    driver(Call(1, StatusAsk()))
    header, _ = driver.sent(StatusAsk)
    assert driver(Disconnected()) == [Lost()]
    assert driver.at(60_000) == []
    driver(Connected())
    driver.welcome(epoch=2)
    again, _ = driver.sent(StatusAsk)
    assert again.id == header.id


def test_what_must_not_be_said_twice_fails_with_the_connection() -> None:
    driver = Driver()
    driver(Call(1, StatusAsk(), once=True))
    driver.at(10_000)
    assert not driver.all_sent(StatusAsk)
    (answer,) = only(driver(Disconnected()), Answer)
    assert isinstance(answer.message, Failed) and answer.message.kind is ErrorKind.UNAVAILABLE


def test_a_forgotten_call_is_never_answered() -> None:
    driver = Driver()
    driver(Call(1, StatusAsk()))
    header, _ = driver.sent(StatusAsk)
    driver(Forget(1))
    assert driver.answer(header, Done()) == []


def test_too_many_requests_are_refused_at_once() -> None:
    driver = Driver()
    for call in range(limits.REQUESTS_IN_FLIGHT_MAX):
        driver.session.handle(0, Call(call, StatusAsk()))
    (answer,) = driver(Call(-1, StatusAsk()))
    assert isinstance(answer, Answer) and isinstance(answer.message, Failed)
    assert answer.message.kind is ErrorKind.EXHAUSTED


def test_a_message_that_cannot_be_sent_answers_its_call() -> None:
    driver = Driver()
    driver(Call(1, StatusAsk()))
    header, _ = driver.sent(StatusAsk)
    effects = driver(SendRefused(header.id, ErrorKind.INVALID, "too large"))
    assert effects == [Answer(1, Failed(ErrorKind.INVALID, "too large"))]


# --- streams ----------------------------------------------------------------------------------


def test_a_stream_from_request_to_acknowledged_end() -> None:
    driver = Driver()
    header = driver.open()
    assert header.target == "tokenizer"
    assert driver.text(0, "ab", 1) == [StreamRow(STREAM, "ab", 2, 1)]
    assert driver.text(0, "ab", 1) == []
    assert driver(Consumed(STREAM, 2, 1)) == []
    driver.at(limits.ACK_MS)
    assert driver.sent(StreamAcked)[1] == StreamAcked([STREAM], [2], [1], [False])
    assert driver.text(2, "c", 2, END) == [StreamRow(STREAM, "c", 3, 2, END)]
    driver(Consumed(STREAM, 3, 2, ended=True))
    assert driver.session.streams_open == 0
    driver.at(2 * limits.ACK_MS)
    assert driver.sent(StreamAcked)[1] == StreamAcked([STREAM], [3], [2], [True])
    # The acknowledgement was lost: the end comes again.
    assert driver.text(2, "c", 2, END) == []
    driver.at(4 * limits.ACK_MS)
    assert driver.sent(StreamAcked)[1] == StreamAcked([STREAM], [3], [2], [True])


def test_half_the_credit_is_acknowledged_at_once() -> None:
    driver = Driver()
    driver.open()
    half = limits.CREDIT_TOKENS // 2
    driver.text(0, "ab", half)
    driver(Consumed(STREAM, 2, half))
    assert driver.sent(StreamAcked)[1].tokens == [half]


def test_a_gap_is_asked_for_once() -> None:
    driver = Driver()
    driver.open()
    driver.text(3, "d", 4)
    header, attach = driver.sent(Attach)
    assert attach == Attach(STREAM, 0, 0)
    assert driver.text(3, "d", 4) == []
    assert driver.answer(header, Attached(THREAD, "m", 4)) == []
    assert driver.text(0, "abcd", 4) == [StreamRow(STREAM, "abcd", 4, 4)]


def test_a_silent_stream_is_asked_for_ever_less_often() -> None:
    driver = Driver()
    driver.open()
    driver.text(0, "a", 1)
    times = []
    for _ in range(5):
        while not driver.all_sent(Attach):
            driver.at(driver.now_ms + 100)
        times.append(driver.now_ms)
        header, attach = driver.sent(Attach)
        assert attach == Attach(STREAM, 1, 0)
        driver.answer(header, Attached(THREAD, "m", 1))
    assert [late - early for early, late in zip([0, *times], times)] == [
        2_000,
        4_000,
        8_000,
        16_000,
        16_000,
    ]
    driver.text(1, "b", 2)
    driver.at(times[-1] + 2_000)
    assert driver.all_sent(Attach)


def test_after_a_reconnect_open_streams_are_asked_for_and_acknowledged() -> None:
    driver = Driver()
    driver.open()
    driver.text(0, "ab", 2)
    driver(Consumed(STREAM, 2, 2))
    driver(Disconnected())
    driver(Connected())
    driver.welcome(epoch=2)
    assert driver.sent(Attach)[1] == Attach(STREAM, 2, 0)
    assert driver.sent(StreamAcked)[1] == StreamAcked([STREAM], [2], [2], [False])


def test_a_stale_stream_is_believed_only_after_several_questions() -> None:
    driver = Driver()
    driver.open()
    driver.text(3, "d", 4)
    stale = Failed(ErrorKind.STALE, "offset 3, committed 1")
    questions = 0
    failures: list[StreamFailed] = []
    while not failures:
        if driver.all_sent(Attach):
            questions += 1
            failures = only(driver.answer(driver.sent(Attach)[0], stale), StreamFailed)
        else:
            driver.at(driver.now_ms + 50)
    assert failures == [StreamFailed(STREAM, ErrorKind.STALE, "offset 3, committed 1")]
    assert (questions, driver.session.streams_open) == (5, 0)


def test_rows_may_come_before_accepted() -> None:
    driver = Driver()
    header = driver.open(accept=False)
    assert driver.text(0, "a", 1) == [StreamRow(STREAM, "a", 1, 1)]
    assert driver.answer(header, ACCEPTED) == [Answer(1, ACCEPTED)]


def test_a_refused_request_leaves_no_stream() -> None:
    driver = Driver()
    header = driver.open(accept=False)
    failed = Failed(ErrorKind.INVALID, "5000 tokens, the context holds 2048")
    assert driver.answer(header, failed) == [Answer(1, failed)]
    assert driver.session.streams_open == 0


def test_a_closed_stream_is_cancelled_and_its_end_acknowledged() -> None:
    driver = Driver()
    driver.open()
    driver(Close(STREAM))
    header, cancel = driver.sent(ThreadCancel)
    assert cancel == ThreadCancel(THREAD)
    driver.answer(header, Done())
    driver.at(limits.ACK_MS)
    assert driver.sent(StreamAcked)[1].ended == [True]
    assert driver.text(0, "ab", 2) == []
    assert driver.session.requests_outstanding == 0


def test_a_detached_stream_goes_on() -> None:
    driver = Driver()
    driver.open()
    assert driver(Close(STREAM, cancel=False)) == []
    driver.at(1_000)
    assert not driver.all_sent(StreamAcked) and not driver.all_sent(ThreadCancel)


def test_a_request_given_up_before_its_answer_is_cancelled_when_that_comes() -> None:
    driver = Driver()
    header = driver.open(accept=False)
    driver(Forget(1))
    assert driver.session.streams_open == 0
    assert driver.answer(header, ACCEPTED)
    assert driver.sent(ThreadCancel)[1] == ThreadCancel(THREAD)


def test_a_deadline_before_accepted_answers_and_cancels_later() -> None:
    driver = Driver()
    header = driver.open(accept=False, deadline_ms=1_000)
    (answer,) = only(driver.at(1_000), Answer)
    assert isinstance(answer.message, Failed) and answer.message.kind is ErrorKind.DEADLINE
    driver.answer(header, ACCEPTED)
    assert driver.sent(ThreadCancel)[1] == ThreadCancel(THREAD)


def test_a_deadline_in_mid_stream_fails_it_and_cancels() -> None:
    driver = Driver()
    driver.open(deadline_ms=1_000)
    driver.text(0, "a", 1)
    effects = driver.at(1_000)
    (failure,) = only(effects, StreamFailed)
    assert failure.kind is ErrorKind.DEADLINE
    assert driver.sent(ThreadCancel)[1] == ThreadCancel(THREAD)


def test_a_stream_is_resumed_by_its_id() -> None:
    driver = Driver()
    driver(Resume(4, STREAM, offset=7, scores=2))
    header, attach = driver.sent(Attach)
    assert attach == Attach(STREAM, 7, 2)
    attached = Attached(THREAD, "m", 9)
    assert driver.answer(header, attached) == [Answer(4, attached)]
    assert driver.text(7, "hi", 3) == [StreamRow(STREAM, "hi", 9, 3)]
    (answer,) = only(driver(Resume(5, STREAM)), Answer)
    assert isinstance(answer.message, Failed) and answer.message.kind is ErrorKind.INVALID


def test_a_stream_that_cannot_be_resumed_fails_its_call_only() -> None:
    driver = Driver()
    driver(Resume(4, STREAM))
    header, _ = driver.sent(Attach)
    failed = Failed(ErrorKind.DENIED, "another tenant's")
    assert driver.answer(header, failed) == [Answer(4, failed)]
    assert driver.session.streams_open == 0


def test_every_choice_has_its_stream() -> None:
    driver = Driver()
    generate = Generate(key=KEY, prompt="Hi", choices=3, sampling=Sampling(temperature=0.0))
    driver(Open(1, generate))
    header, _ = driver.sent(Generate)
    driver.answer(header, Accepted([b"0" * 8, b"1" * 8, b"2" * 8], "m", 2))
    driver(Close(stream_id(KEY, 1)))
    assert driver.sent(ThreadCancel)[1] == ThreadCancel(b"1" * 8)
    assert driver.session.streams_open == 2


def test_leaving_cancels_and_says_goodbye() -> None:
    driver = Driver()
    driver.open()
    driver(Leave())
    assert driver.sent(ThreadCancel)[1] == ThreadCancel(THREAD)
    assert driver.sent(Goodbye)[1] == Goodbye("done")
    assert driver.session.state is State.OVER
    assert driver.at(10_000) == []


def test_an_end_that_was_received_survives_a_refusal() -> None:
    driver = Driver()
    driver.open()
    driver.text(0, "a", 1, END)
    effects = driver.arrive(Goodbye("replaced"))
    assert only(effects, StreamFailed) == []
    assert driver(Consumed(STREAM, 1, 1, ended=True)) == []
