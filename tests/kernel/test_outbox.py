"""Nothing leaves before what it depends on is safe, and nothing overtakes."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from llmkernel.journal import Journal, Options
from llmkernel.outbox import HELD_MAX, Outbox
from llmproto.errors import ErrorKind, RemoteError


class Paper(Journal):
    """A journal in memory, whose disk is full when told so."""

    def __init__(self) -> None:
        super().__init__(Path("/nowhere"), Options(bytes_max=1 << 20))
        self.records: list[bytes] = []
        self.full = False
        self.broken = False

    def append(self, payload: bytes) -> int:
        if self.broken:
            raise RemoteError(ErrorKind.INTERNAL, "broken")
        if self.full:
            raise RemoteError(ErrorKind.EXHAUSTED, "full")
        self.records.append(payload)
        return 10 * len(self.records)


class Desk:
    """An outbox, its journal, and what has left."""

    def __init__(self, *, wait_for_sync: bool) -> None:
        self.paper = Paper()
        self.left: list[bytes] = []
        self.outbox = Outbox(
            self.paper,
            lambda peer, frames: self.left.append(frames[0]),
            wait_for_sync=wait_for_sync,
        )

    def send(self, name: bytes) -> None:
        self.outbox.send(b"peer", (name,))


def test_written_is_enough_unless_the_policy_is_always() -> None:
    desk = Desk(wait_for_sync=False)
    desk.outbox.record([b"fact"])
    desk.send(b"a")
    assert desk.left == [b"a"]


def test_always_waits_for_the_disk_and_keeps_the_order() -> None:
    desk = Desk(wait_for_sync=True)
    desk.send(b"free")
    desk.outbox.record([b"one"])
    desk.send(b"a")
    desk.outbox.record([b"two"])
    desk.send(b"b")
    assert desk.left == [b"free"]
    desk.outbox.synced(10)
    assert desk.left == [b"free", b"a"]
    desk.outbox.synced(20)
    assert desk.left == [b"free", b"a", b"b"]


def test_an_answer_without_a_fact_of_its_own_waits_for_those_before_it() -> None:
    # It may tell of what an earlier event has decided.
    desk = Desk(wait_for_sync=True)
    desk.outbox.record([b"decided"])
    desk.send(b"tells of it")
    assert desk.left == []
    desk.outbox.synced(10)
    desk.send(b"later")
    assert desk.left == [b"tells of it", b"later"]


def test_a_full_disk_holds_what_depends_on_it_and_loses_nothing() -> None:
    desk = Desk(wait_for_sync=False)
    desk.outbox.record([b"one"])
    desk.paper.full = True
    desk.outbox.record([b"two", b"three"])
    desk.send(b"a")
    assert desk.outbox.stuck
    assert (desk.left, desk.outbox.held) == ([], 1)
    desk.outbox.retry()
    assert desk.left == []
    desk.paper.full = False
    desk.outbox.retry()
    assert desk.paper.records == [b"one", b"two", b"three"]
    assert desk.left == [b"a"]
    assert not desk.outbox.stuck


def test_a_broken_disk_is_not_a_full_one() -> None:
    desk = Desk(wait_for_sync=False)
    desk.paper.broken = True
    with pytest.raises(RemoteError, match="broken"):
        desk.outbox.record([b"one"])


def test_what_waits_is_bounded() -> None:
    desk = Desk(wait_for_sync=True)
    desk.outbox.record([b"one"])
    for _ in range(HELD_MAX):
        desk.send(b"a")
    with pytest.raises(AssertionError, match="wait for the disk"):
        desk.send(b"one too many")


@given(
    st.lists(st.sampled_from(["record", "send", "sync", "full", "free"]), max_size=40),
    st.booleans(),
)
def test_nothing_overtakes(steps: list[str], wait_for_sync: bool) -> None:
    """Whatever happens: messages leave in order, each behind every record given before it."""
    desk = Desk(wait_for_sync=wait_for_sync)
    given_records = 0
    needs: list[int] = []
    synced = 0
    for step in steps:
        if step == "record":
            given_records += 1
            desk.outbox.record([b"%d" % given_records])
        elif step == "send":
            desk.send(b"%d" % len(needs))
            needs.append(given_records)
        elif step == "sync":
            synced = len(desk.paper.records)
            desk.outbox.synced(10 * synced)
        elif step == "full":
            desk.paper.full = True
        else:
            desk.paper.full = False
            desk.outbox.retry()
        assert desk.paper.records == [b"%d" % (n + 1) for n in range(len(desk.paper.records))]
        assert desk.left == [b"%d" % n for n in range(len(desk.left))]
        safe = synced if wait_for_sync else len(desk.paper.records)
        assert len(desk.left) == sum(need <= safe for need in needs)
