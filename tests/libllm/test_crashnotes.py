"""What was being computed is read back, whenever its writer died."""

import os
import signal
import struct
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st
from libllm.crashnotes import ROWS_MAX, CrashNote, read_note

rows = st.lists(
    st.tuples(st.binary(min_size=8, max_size=8), st.integers(0, (1 << 64) - 1)), max_size=50
)


def test_what_was_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "note"
    note = CrashNote(path)
    assert read_note(path) == []

    @given(rows)
    def written(found: list[tuple[bytes, int]]) -> None:
        note.write(found)
        assert read_note(path) == found

    written()
    note.write([(b"thread01", 7)])
    note.clear()
    assert read_note(path) == []


def test_it_survives_its_writer(tmp_path: Path) -> None:
    path = tmp_path / "note"
    pid = os.fork()
    if pid == 0:
        CrashNote(path).write([(b"thread01", 7), (b"thread02", 9)])
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    assert read_note(path) == [(b"thread01", 7), (b"thread02", 9)]


def test_a_new_incarnation_begins_with_nothing(tmp_path: Path) -> None:
    CrashNote(tmp_path / "note").write([(b"thread01", 7)])
    CrashNote(tmp_path / "note")
    assert read_note(tmp_path / "note") == []


def test_more_than_there_may_be_is_cut(tmp_path: Path) -> None:
    note = CrashNote(tmp_path / "note")
    note.write([(b"thread01", number) for number in range(ROWS_MAX + 5)])
    assert len(read_note(tmp_path / "note")) == ROWS_MAX


def test_what_is_no_note_names_nobody(tmp_path: Path) -> None:
    path = tmp_path / "note"
    assert read_note(path) == []
    for content in (b"", b"\1\0", struct.pack("<I", 2) + bytes(16), b"\xff" * 100):
        path.write_bytes(content)
        assert read_note(path) == []


@given(st.binary(max_size=200))
def test_garbage_raises_nothing(content: bytes) -> None:
    path = Path(f"/dev/shm/llmos-note-{os.getpid()}")
    path.write_bytes(content)
    try:
        assert all(len(thread) == 8 for thread, _ in read_note(path))
    finally:
        path.unlink()
