"""Compaction keeps the state, whenever the process dies."""

import shutil
from pathlib import Path

from llmkernel import facts, turns
from llmkernel.compaction import SLICE_FACTS, Compaction
from llmkernel.facts import AnyFact, ThreadAdmitted, ThreadsForgotten, TokensCommitted
from llmkernel.journal import Journal, Options
from llmkernel.state import State
from llmproto import wire
from llmproto.errors import ErrorKind, RemoteError
from llmproto.generation import Sampling

SEGMENT = 64 << 10
THREADS = 3 * SLICE_FACTS


def admitted(number: int) -> ThreadAdmitted:
    return ThreadAdmitted(
        thread=number.to_bytes(8),
        tenant=1,
        session=bytes(16),
        key=number.to_bytes(16),
        index=0,
        digest=bytes(16),
        model="m",
        tokens=wire.pack_tokens(range(40)),
        prompt_tokens=40,
        output_tokens_max=200,
        sampling=Sampling(),
        sink="tokenizer",
        sink_state=b"",
        service_class=1,
        priority=0,
        deadline_ns=None,
        resumable=False,
        admitted_ns=number,
    )


class Book:
    """A state and the journal that it is written in."""

    def __init__(self, folder: Path, bytes_max: int = 1 << 30) -> None:
        self.folder = folder
        self.options = Options(
            sync="group", bytes_max=bytes_max, segment_bytes=SEGMENT, reserve_bytes=4096
        )
        self.journal, records = Journal.open(folder, self.options)
        self.state = replay(records)

    def write(self, fact: AnyFact) -> None:
        self.state.apply(fact)
        self.journal.append(facts.encode(fact))

    def fill(self) -> None:
        for number in range(THREADS):
            self.write(admitted(number))
        for position in range(40, 60):
            names = [number.to_bytes(8) for number in range(THREADS)]
            positions, tokens = [position] * THREADS, [7] * THREADS
            self.write(TokensCommitted(names, positions, tokens))


def replay(records: object) -> State:
    state = State()
    assert hasattr(records, "__iter__")
    for record in records:
        for fact in turns.decode(record):
            state.apply(fact)
    state.check()
    return state


def replayed(folder: Path, copy: Path) -> State:
    """What another process would find now."""
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("unfinished*"))
    journal, records = Journal.open(copy, Options(bytes_max=1 << 30, segment_bytes=SEGMENT))
    state = replay(records)
    journal.close()
    return state


def test_the_state_survives_and_the_journal_shrinks(tmp_path: Path) -> None:
    book = Book(tmp_path / "journal")
    book.fill()
    before = book.journal.oldest
    compaction = Compaction(book.journal, book.state, begin_bytes=SEGMENT)
    assert compaction.step()
    while compaction.step():
        pass
    assert not compaction.running
    book.journal.wait_synced(book.journal.position)
    book.journal.close()
    assert book.journal.oldest > before
    journal, records = Journal.open(tmp_path / "journal", book.options)
    assert replay(records).digest() == book.state.digest()
    journal.close()


def test_what_happens_meanwhile_counts_and_a_death_in_the_middle_does_not(tmp_path: Path) -> None:
    book = Book(tmp_path / "journal")
    book.fill()
    compaction = Compaction(book.journal, book.state, begin_bytes=SEGMENT)
    slices = 0
    while compaction.step():
        slices += 1
        book.write(admitted(1000 + slices))
        book.write(TokensCommitted([slices.to_bytes(8)], [60], [9]))
        book.write(ThreadsForgotten([(SLICE_FACTS * slices + 3).to_bytes(8)], 5))
        found = replayed(tmp_path / "journal", tmp_path / f"copy{slices}")
        assert found.digest() == book.state.digest()
    assert slices >= 3
    book.journal.wait_synced(book.journal.position)
    book.journal.close()
    journal, records = Journal.open(tmp_path / "journal", book.options)
    assert replay(records).digest() == book.state.digest()
    journal.close()


class Refusing(Journal):
    """Has room for so many records only."""

    left = 0

    def append(self, payload: bytes) -> int:
        if self.left == 0:
            raise RemoteError(ErrorKind.EXHAUSTED, "no room")
        self.left -= 1
        return super().append(payload)


def test_no_room_in_the_middle_loses_no_fact(tmp_path: Path) -> None:
    book = Book(tmp_path / "journal")
    book.fill()
    book.journal.close()
    options = Options(sync="group", bytes_max=1 << 30, segment_bytes=SEGMENT)
    opened, records = Refusing.open(tmp_path / "journal", options)
    assert isinstance(opened, Refusing)
    state = replay(records)
    compaction = Compaction(opened, state, begin_bytes=SEGMENT)
    while True:
        opened.left = 7
        if not compaction.step() and not compaction.running:
            break
    opened.wait_synced(opened.position)
    opened.close()
    journal, records = Journal.open(tmp_path / "journal", options)
    assert replay(records).digest() == state.digest()
    journal.close()


def test_a_short_journal_is_left_alone(tmp_path: Path) -> None:
    book = Book(tmp_path / "journal")
    book.fill()
    assert not Compaction(book.journal, book.state).step()
    book.journal.close()


def test_it_begins_while_there_is_room_for_what_lives(tmp_path: Path) -> None:
    book = Book(tmp_path / "journal")
    book.fill()
    compaction = Compaction(book.journal, book.state, journal_bytes_max=4 * SEGMENT)
    assert compaction.step()
    book.journal.close()
