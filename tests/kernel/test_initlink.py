"""The link of init and kernel: what is sent arrives whole and in order, or the end is seen."""

import socket

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llmkernel import initlink
from llmkernel.initlink import Link
from llmproto.errors import ErrorKind, RemoteError
from llmproto.init import Fork, Halt, InitMessage, KernelBeat, Promoted, Signal, Spec, Stop
from llmproto.kinds import KIND_OF

ARGUMENTS = st.lists(st.text(max_size=30_000), max_size=4)
FORKS = st.builds(
    Fork,
    spec=st.builds(
        Spec, name=st.just("n"), role=st.just("r"), module=st.just("m"), arguments=ARGUMENTS
    ),
    incarnation=st.integers(0, (1 << 53) - 1),
)
SIGNALS = st.builds(
    Signal,
    pid=st.integers(0, 1 << 22),
    incarnation=st.integers(0, 9),
    signal=st.integers(1, 64),
)
MESSAGES = st.one_of(FORKS, SIGNALS, st.builds(Halt), st.builds(Stop))


def linked() -> tuple[Link, Link]:
    """Both ends."""
    ours, theirs = initlink.pair()
    return ours, Link(theirs)


def exchanged(sender: Link, receiver: Link) -> list[InitMessage]:
    """All that the sender still holds and the socket holds."""
    received = receiver.receive()
    while not sender.flush():
        received += receiver.receive()
    return received + receiver.receive()


@given(st.lists(MESSAGES, max_size=30))
@settings(deadline=None)
def test_arrives_whole_and_in_order(messages: list[InitMessage]) -> None:
    ours, theirs = linked()
    for message in messages:
        ours.send(message)
    assert exchanged(ours, theirs) == messages
    ours.close()
    theirs.close()


def test_large_messages_go_in_parts() -> None:
    spec = Spec(name="n", role="r", module="m", arguments=["x" * 4000] * 64)
    promoted = Fork(spec=spec, incarnation=1)
    datagrams = initlink.encode(promoted)
    assert len(datagrams) > 7
    assert max(map(len, datagrams)) <= initlink.PART_BYTES + 2
    ours, theirs = linked()
    ours.send(promoted)
    ours.send(Halt())
    assert exchanged(ours, theirs) == [promoted, Halt()]
    ours.close()
    theirs.close()


def test_beats_do_not_pile_up() -> None:
    ours, theirs = linked()
    for _ in range(10_000):
        ours.send(KernelBeat())
    assert ours.waiting <= 1
    assert set(map(type, exchanged(ours, theirs))) == {KernelBeat}
    ours.close()
    theirs.close()


def test_the_end_is_seen_after_what_was_sent() -> None:
    ours, theirs = linked()
    ours.send(Halt())
    ours.close()
    assert theirs.receive() == [Halt()]
    assert theirs.closed
    theirs.send(Stop())
    assert theirs.waiting == 0
    theirs.close()


def test_sending_to_nobody_closes() -> None:
    ours, theirs = linked()
    theirs.close()
    ours.send(Halt())
    assert ours.closed
    assert ours.receive() == []
    ours.close()


@given(st.binary(min_size=1, max_size=200))
def test_garbage_is_refused(datagram: bytes) -> None:
    first, second = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    link = Link(second)
    first.send(datagram)
    try:
        link.receive()
    except RemoteError as error:
        assert error.kind is ErrorKind.INVALID
    first.close()
    link.close()


def test_other_conversations_are_refused() -> None:
    with pytest.raises(RemoteError, match="0x0007 is not spoken"):
        initlink.decode(0x0007, b"\x80")
    with pytest.raises(RemoteError):
        initlink.decode(KIND_OF[Promoted], b"\x80")
