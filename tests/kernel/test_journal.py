"""The journal: what is read is what was appended, whatever death, tear or flip came between."""

import os
import random
import shutil
import struct
import subprocess
import sys
import tempfile
import threading
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from llmkernel import segments
from llmkernel.journal import Journal, Options, SyncPolicy, segment_of
from llmproto import limits
from llmproto.errors import ErrorKind, RemoteError

SMALL = 1 << 12
OPTIONS = Options(bytes_max=1 << 30, segment_bytes=SMALL, reserve_bytes=SMALL // 4)
PAYLOADS = st.lists(st.binary(min_size=1, max_size=600), max_size=40)


def opened(folder: Path, options: Options = OPTIONS) -> tuple[Journal, list[bytes]]:
    """The journal, replayed to its end."""
    journal, payloads = Journal.open(folder, options)
    return journal, list(payloads)


def replayed(folder: Path) -> list[bytes]:
    """What a next process reads."""
    journal, payloads = opened(folder)
    journal.close()
    return payloads


def written(folder: Path, payloads: list[bytes]) -> None:
    """A journal that holds these and was closed."""
    journal, _ = opened(folder)
    for payload in payloads:
        journal.append(payload)
    journal.close()


def last_written(folder: Path) -> Path:
    """The last segment that holds a record."""
    numbers = segments.numbers_in(folder)
    readings = [segments.Reading(segments.path_of(folder, number), number) for number in numbers]
    return max((reading.path for reading in readings if not reading.empty), default=Path())


@given(PAYLOADS)
@settings(deadline=None, max_examples=50)
def test_reads_back_what_was_appended(payloads: list[bytes]) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        written(folder, payloads)
        assert replayed(folder) == payloads
        written(folder, payloads)
        assert replayed(folder) == payloads * 2


@given(PAYLOADS.filter(bool), st.data())
@settings(deadline=None, max_examples=30)
def test_a_tail_torn_at_any_byte_loses_at_most_the_last_record(
    payloads: list[bytes], data: st.DataObject
) -> None:
    with tempfile.TemporaryDirectory() as name:
        whole, torn = Path(name, "whole"), Path(name, "torn")
        written(whole, payloads)
        path = last_written(whole)
        content = path.read_bytes()
        reading = segments.Reading(path, int(path.name[-16:]))
        assert list(reading.payloads())[-1] == payloads[-1]
        keep = data.draw(st.integers(reading.end - len(payloads[-1]) - 8, reading.end))
        shutil.copytree(whole, torn)
        (torn / path.name).write_bytes(content[:keep].ljust(len(content), b"\0"))
        assert replayed(torn) in (payloads, payloads[:-1])
        written(torn, [b"after"])
        assert replayed(torn) in ([*payloads, b"after"], [*payloads[:-1], b"after"])


def test_every_byte_of_the_last_record(tmp_path: Path) -> None:
    written(tmp_path, [b"first", b"second"])
    path = last_written(tmp_path)
    content = path.read_bytes()
    end = content.index(b"second") + len(b"second")
    for keep in range(end - len(b"second") - 8, end):
        path.write_bytes(content[:keep].ljust(len(content), b"\0"))
        assert replayed(tmp_path) == [b"first"]


def test_bytes_behind_a_tear_never_come_back(tmp_path: Path) -> None:
    written(tmp_path, [b"a" * 10, b"b" * 10, b"c" * 10])
    path = last_written(tmp_path)
    content = bytearray(path.read_bytes())
    content[content.index(b"b" * 10)] ^= 1
    path.write_bytes(content)
    journal, payloads = opened(tmp_path)
    assert payloads == [b"a" * 10]
    assert "torn tail" in journal.notices[0]
    journal.append(b"d" * 10)
    journal.close()
    assert replayed(tmp_path) == [b"a" * 10, b"d" * 10]


@given(st.data())
@settings(deadline=None, max_examples=60)
def test_a_flipped_bit_never_gives_a_wrong_record(data: st.DataObject) -> None:
    payloads = [bytes([number]) * 400 for number in range(1, 25)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        written(folder, payloads)
        path = segments.path_of(folder, data.draw(st.integers(1, 3)))
        content = bytearray(path.read_bytes())
        content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        path.write_bytes(content)
        try:
            found = replayed(folder)
        except RemoteError as error:
            assert error.kind is ErrorKind.INTERNAL
            assert str(folder) in error.detail
        else:
            assert found == payloads[: len(found)]


def test_damage_in_a_synced_earlier_segment_names_file_and_offset(tmp_path: Path) -> None:
    journal, _ = opened(tmp_path)
    for number in range(20):
        position = journal.append(bytes([number + 1]) * 500)
    journal.wait_synced(position)
    journal.close()
    path = segments.path_of(tmp_path, 1)
    content = bytearray(path.read_bytes())
    content[segments.HEADER_BYTES + 8 + 500 + 20] ^= 1
    path.write_bytes(content)
    _, payloads = Journal.open(tmp_path, OPTIONS)
    with pytest.raises(RemoteError) as caught:
        list(payloads)
    assert caught.value.kind is ErrorKind.INTERNAL
    assert f"{path} is damaged at byte {segments.HEADER_BYTES + 508}" in caught.value.detail


def test_an_unsynced_tear_drops_the_segments_behind_it(tmp_path: Path) -> None:
    payloads = [bytes([number + 1]) * 500 for number in range(20)]
    written(tmp_path, payloads)
    first, second = (segments.path_of(tmp_path, number) for number in (1, 2))
    content = bytearray(second.read_bytes())
    content[32 + 4] = 0  # the note that the first segment is on disk: the machine died before
    second.write_bytes(content)
    content = bytearray(first.read_bytes())
    content[segments.HEADER_BYTES + 508 :] = bytes(len(content) - segments.HEADER_BYTES - 508)
    first.write_bytes(content)
    journal, found = opened(tmp_path)
    journal.append(b"anew")
    journal.close()
    assert found == payloads[:1]
    assert "dropped" in journal.notices[0]
    assert replayed(tmp_path) == [payloads[0], b"anew"]


def test_a_missing_segment_is_damage(tmp_path: Path) -> None:
    written(tmp_path, [bytes([number + 1]) * 500 for number in range(40)])
    segments.path_of(tmp_path, 2).unlink()
    with pytest.raises(RemoteError, match=r"0002 is damaged.*missing"):
        replayed(tmp_path)


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    written(tmp_path, [b"x"])
    path = segments.path_of(tmp_path, 1)
    fixed = bytearray(path.read_bytes()[:32])
    fixed[8] = segments.FORMAT + 1
    path.write_bytes(bytes(fixed) + struct.pack("<I", zlib.crc32(fixed)) + bytes(999))
    with pytest.raises(RemoteError, match=f"format {segments.FORMAT + 1}"):
        replayed(tmp_path)


def test_format_1_stays_readable(tmp_path: Path) -> None:
    golden = Path(__file__).with_name("golden") / "segment-format-1.bin"
    shutil.copyfile(golden, segments.path_of(tmp_path, 7))
    journal, payloads = opened(tmp_path)
    assert payloads == [b"first", b"\0second\xff", b"x" * 300]
    assert segment_of(journal.append(b"next")) == 8
    journal.close()
    assert replayed(tmp_path) == [*payloads, b"next"]
    reading = segments.Reading(golden, 7)
    assert len(list(reading.payloads())) == 3
    assert reading.sealed


@pytest.mark.parametrize("length", [0, limits.RECORD_BYTES_MAX + 1])
def test_refuses_a_record_out_of_range(tmp_path: Path, length: int) -> None:
    journal, _ = opened(tmp_path, Options(bytes_max=1 << 30))
    with pytest.raises(RemoteError, match=f"this one {length}") as caught:
        journal.append(bytes(length))
    assert caught.value.kind is ErrorKind.INVALID
    journal.append(bytes(limits.RECORD_BYTES_MAX))
    journal.append(bytes(limits.RECORD_BYTES_MAX))
    journal.close()


def test_mark_and_drop(tmp_path: Path) -> None:
    journal, _ = opened(tmp_path)
    for number in range(20):
        journal.append(bytes([number + 1]) * 500)
    mark = journal.mark()
    assert journal.mark() == mark
    position = journal.append(b"live")
    assert segment_of(position) == mark
    journal.drop_before(mark)
    journal.wait_synced(position)
    journal.close()
    assert replayed(tmp_path) == [b"live"]
    assert segments.numbers_in(tmp_path)[0] == mark


@pytest.mark.parametrize("policy", ["never", "group", "always"])
def test_sync_is_told_across_segment_borders(tmp_path: Path, policy: SyncPolicy) -> None:
    told: list[int] = []
    reached = threading.Event()
    last = [1 << 62]

    def on_synced(position: int) -> None:
        told.append(position)
        if position >= last[0]:
            reached.set()

    options = Options(sync=policy, bytes_max=1 << 30, segment_bytes=SMALL, on_synced=on_synced)
    journal, _ = opened(tmp_path, options)
    positions = [journal.append(bytes(300)) for _ in range(100)]
    assert positions == sorted(set(positions))
    last[0] = positions[-1]
    if policy == "never":
        journal.wait_synced(positions[-1])
    else:
        journal.append(b"one more")
    assert reached.wait(60)
    assert journal.synced_position >= positions[-1]
    assert told == sorted(told)
    journal.close()


def test_bytes_max_closes_the_room_and_dropping_opens_it(tmp_path: Path) -> None:
    options = Options(bytes_max=3 * SMALL, segment_bytes=SMALL, reserve_bytes=SMALL // 2)
    journal, _ = opened(tmp_path, options)
    count = 0
    while until_refused(journal):
        count += 1
    assert not journal.room()
    assert not journal.can_mark
    with pytest.raises(RemoteError, match=str(SMALL)) as caught:
        journal.append(bytes(1000))
    assert caught.value.kind is ErrorKind.EXHAUSTED
    journal.drop_before(3)
    journal.wait_synced(journal.position)
    while not journal.can_mark:
        journal.wait_synced(journal.position)
    assert journal.room()
    journal.append(b"x" * 1000)
    journal.close()
    assert replayed(tmp_path)[-1] == b"x" * 1000


def until_refused(journal: Journal) -> bool:
    """Append one record; False when it is refused for room."""
    try:
        journal.append(bytes(400))
    except RemoteError as error:
        assert error.kind is ErrorKind.EXHAUSTED
        return False
    return True


def refused(command: list[str]) -> bool:
    """Run it; whether it failed."""
    return subprocess.run(command, capture_output=True, check=False).returncode != 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or refused(command):
        pytest.skip("mounting is not permitted")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_closes_the_room_and_space_opens_it(small_disk: Path) -> None:
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(160 << 10))
    size = 32 << 10
    options = Options(bytes_max=1 << 30, segment_bytes=size, reserve_bytes=size // 2)
    folder = small_disk / "journal"
    journal, _ = opened(folder, options)
    accepted = 0
    while until_refused(journal):
        accepted += 1
    assert accepted > 100
    assert not journal.room()
    ballast.unlink()
    while not journal.room():
        journal.wait_synced(journal.position)
    assert until_refused(journal)
    journal.close()
    assert len(replayed(folder)) == accepted + 1


def test_opens_on_a_full_disk(small_disk: Path) -> None:
    folder = small_disk / "journal"
    options = Options(bytes_max=1 << 30, segment_bytes=32 << 10)
    journal, _ = opened(folder, options)
    while until_refused(journal):
        pass
    journal.close()
    journal, payloads = opened(folder, options)
    assert len(payloads) > 100
    journal.close()


def test_kill_at_random_moments_keeps_all_that_was_acknowledged(tmp_path: Path) -> None:
    source = random.Random(7)
    script = str(Path(__file__).with_name("journal_writer.py"))
    written_max = -1
    for _ in range(6):
        writer = subprocess.Popen(
            [sys.executable, script, str(tmp_path), str(written_max + 1)],
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        )
        assert writer.stdout is not None
        acknowledged = writer.stdout.read(8 * source.randrange(1, 4000))
        writer.kill()
        acknowledged += writer.stdout.read()
        writer.stdout.close()
        writer.wait()
        (told,) = struct.unpack("<Q", acknowledged[len(acknowledged) // 8 * 8 - 8 :][:8])
        journal, payloads = opened(tmp_path, Options(bytes_max=1 << 30, segment_bytes=1 << 16))
        journal.close()
        assert payloads == [struct.pack("<Q", n) * (1 + n % 97) for n in range(len(payloads))]
        written_max = len(payloads) - 1
        assert told in (written_max, written_max - 1)


class JournalMachine(RuleBasedStateMachine):
    """The journal against a plain list, through reopening, dropping and marking."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.journal, _ = opened(self.folder)
        self.model: list[tuple[int, bytes]] = []
        self.marks: list[int] = []

    @rule(payload=st.binary(min_size=1, max_size=3000))
    def append(self, payload: bytes) -> None:
        self.model.append((self.journal.append(payload), payload))

    @rule()
    def mark(self) -> None:
        self.marks.append(self.journal.mark())

    @precondition(lambda self: bool(self.marks))
    @rule()
    def drop(self) -> None:
        mark = self.marks.pop()
        self.journal.drop_before(mark)
        self.reopen()
        self.model = [row for row in self.model if segment_of(row[0]) >= self.journal.oldest]

    @rule()
    def reopen(self) -> None:
        self.journal.wait_synced(self.journal.position)
        self.journal.close()
        self.journal, payloads = opened(self.folder)
        kept = [row for row in self.model if segment_of(row[0]) >= self.journal.oldest]
        assert payloads == [payload for _, payload in kept]

    @invariant()
    def ascends(self) -> None:
        positions = [position for position, _ in self.model]
        assert positions == sorted(set(positions))
        assert not positions or positions[-1] <= self.journal.position

    def teardown(self) -> None:
        self.journal.close()
        shutil.rmtree(self.folder)


TestJournalMachine: Callable[..., object] = JournalMachine.TestCase
JournalMachine.TestCase.settings = settings(deadline=None, max_examples=15, stateful_step_count=20)
