"""The real Llm over a port whose session is the test."""

import asyncio
from collections.abc import Callable

import pytest
from libllm.events import (
    Answer,
    Call,
    Close,
    Consumed,
    Event,
    Forget,
    Open,
    Resume,
    StreamFailed,
    StreamRow,
)
from libllm.port import Port
from llmproto.base import Message
from llmproto.connection import Failed
from llmproto.errors import ErrorKind, RemoteError
from llmproto.generation import Accepted, Attached, Generate, StreamEnd
from llmproto.operation import Status, StatusAsk
from llmservices.gateway import bus as bus_module
from llmservices.gateway.bus import BusLlm
from llmservices.gateway.llm import Inbox

KEY = b"k" * 16
STREAM = KEY + b"\x00"
ACCEPTED = Accepted([b"t" * 8], "tiny", 3)
END = StreamEnd("length", 1, 1)


class ScriptedPort(Port):
    """Answers as the table says; what it does not name stays unanswered."""

    def __init__(self, answers: dict[type[Event], Message]) -> None:
        super().__init__(self._fed)
        self.answers = answers
        self.events: list[Event] = []

    def _fed(self, event: Event) -> None:
        self.events.append(event)
        if isinstance(event, Call | Open | Resume) and type(event) in self.answers:
            answer = Answer(event.call, self.answers[type(event)])
            self.loop.call_soon(self.deliver, answer)

    def of(self, kind: type[Event]) -> list[Event]:
        """What was fed of that kind."""
        return [event for event in self.events if isinstance(event, kind)]


async def opened(port: ScriptedPort, llm: BusLlm, inbox: Inbox) -> Accepted:
    """One stream."""
    generate = Generate(KEY, prompt="a")
    return await llm.open(generate, inbox, tenant=5, patience_ms=1000)


def check(llm: BusLlm, *, streams: int) -> None:
    """Invariants, and how many streams are read."""
    llm.check()
    assert llm.streams == streams


async def test_calls() -> None:
    port = ScriptedPort({Call: Status(True, "1", 1, 1)})
    found = await BusLlm(port).call(StatusAsk(), Status, tenant=5, patience_ms=1000)
    assert found.ready
    call = port.events[0]
    assert isinstance(call, Call)
    assert (call.tenant, call.target, call.deadline_ns is not None) == (5, "kernel", True)


async def test_rows_reach_the_inbox_and_are_consumed() -> None:
    port = ScriptedPort({Open: ACCEPTED})
    llm, inbox = BusLlm(port), Inbox()
    assert await opened(port, llm, inbox) == ACCEPTED
    first, last = StreamRow(STREAM, "a", 1, 1), StreamRow(STREAM, "b", 2, 2, END)
    for row in (first, last):
        port.deliver(row)
        assert await inbox.take() == [row]
        llm.consume(row, keep=False)
    assert port.of(Consumed) == [Consumed(STREAM, 1, 1), Consumed(STREAM, 2, 2, ended=True)]
    check(llm, streams=0)


async def test_a_refusal_leaves_nothing_behind() -> None:
    port = ScriptedPort({Open: Failed(ErrorKind.EXHAUSTED, "full", 10)})
    llm = BusLlm(port)
    with pytest.raises(RemoteError) as caught:
        await opened(port, llm, Inbox())
    assert (caught.value.kind, caught.value.retry_after_ms) == (ErrorKind.EXHAUSTED, 10)
    check(llm, streams=0)


async def test_a_handle_that_a_new_kernel_does_not_know_yet(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bus_module, "HANDLE_WAITS_S", (0.0, 0.0))
    port = ScriptedPort({Open: Failed(ErrorKind.STALE, "not given")})
    llm = BusLlm(port)
    with pytest.raises(RemoteError) as caught:
        await opened(port, llm, Inbox())
    assert caught.value.kind is ErrorKind.STALE
    asked = [event.generate for event in port.events if isinstance(event, Open)]
    assert len(asked) == 3
    assert len(set(map(repr, asked))) == 1
    check(llm, streams=0)


async def test_patience() -> None:
    port = ScriptedPort({})
    llm = BusLlm(port)
    with pytest.raises(RemoteError) as caught:
        await llm.open(Generate(KEY, prompt="a"), Inbox(), tenant=None, patience_ms=0)
    assert caught.value.kind is ErrorKind.UNAVAILABLE
    assert len(port.of(Forget)) == 1
    check(llm, streams=0)


async def test_who_gives_up_forgets() -> None:
    port = ScriptedPort({})
    llm = BusLlm(port)
    task = asyncio.create_task(opened(port, llm, Inbox()))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert len(port.of(Forget)) == 1
    check(llm, streams=0)


async def test_a_failed_stream_fails_its_inbox() -> None:
    port = ScriptedPort({Open: ACCEPTED})
    llm, inbox = BusLlm(port), Inbox()
    await opened(port, llm, inbox)
    port.deliver(StreamFailed(STREAM, ErrorKind.STALE, "gone"))
    with pytest.raises(RemoteError, match="gone"):
        await inbox.take()


@pytest.mark.parametrize("cancel", [True, False])
async def test_closing(cancel: bool) -> None:
    port = ScriptedPort({Open: ACCEPTED})
    llm, inbox = BusLlm(port), Inbox()
    await opened(port, llm, inbox)
    llm.close(STREAM, Inbox(), cancel=cancel)  # another's: no effect
    llm.close(STREAM, inbox, cancel=cancel)
    llm.close(STREAM, inbox, cancel=cancel)
    assert port.of(Close) == [Close(STREAM, cancel=cancel)]
    check(llm, streams=0)


async def test_a_second_reader_takes_over() -> None:
    port = ScriptedPort({Open: ACCEPTED, Resume: Attached(b"t" * 8, "tiny", 0)})
    llm, first, second = BusLlm(port), Inbox(), Inbox()
    await opened(port, llm, first)
    await llm.resume(STREAM, second, offset=1, scores=0, tenant=5, patience_ms=1000)
    with pytest.raises(RemoteError) as caught:
        await first.take()
    assert caught.value.kind is ErrorKind.STALE
    llm.close(STREAM, first, cancel=True)
    check(llm, streams=1)
    assert port.of(Close) == [Close(STREAM, cancel=False)]


async def kept(port: ScriptedPort) -> BusLlm:
    """A resumable stream whose end was sent."""
    llm, inbox = BusLlm(port), Inbox()
    await opened(port, llm, inbox)
    llm.consume(StreamRow(STREAM, "b", 2, 2, END), keep=True)
    check(llm, streams=0)
    assert port.of(Consumed) == []
    return llm


async def test_an_end_that_may_be_asked_for_again_is_acknowledged_later() -> None:
    port = ScriptedPort({Open: ACCEPTED})
    later: list[Callable[[], None]] = []
    llm = await kept(port)
    handle = llm._kept[STREAM][1]
    later.append(handle._run)
    later[0]()
    assert port.of(Consumed) == [Consumed(STREAM, 2, 2, ended=True)]
    check(llm, streams=0)


async def test_resuming_after_the_end_keeps_it() -> None:
    port = ScriptedPort({Open: ACCEPTED, Resume: Attached(b"t" * 8, "tiny", 0)})
    llm = await kept(port)
    await llm.resume(STREAM, Inbox(), offset=0, scores=0, tenant=5, patience_ms=1000)
    assert port.of(Close) == [Close(STREAM, cancel=False)]
    check(llm, streams=1)


async def test_ends_that_wait_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bus_module, "KEPT_MAX", 0)
    port = ScriptedPort({Open: ACCEPTED})
    llm, inbox = BusLlm(port), Inbox()
    await opened(port, llm, inbox)
    llm.consume(StreamRow(STREAM, "b", 2, 2, END), keep=True)
    assert port.of(Consumed) == [Consumed(STREAM, 2, 2, ended=True)]
    check(llm, streams=0)
