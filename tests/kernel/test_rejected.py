"""What a kernel died of, for the next one."""

from pathlib import Path

import pytest
from llmkernel import rejected
from llmkernel.events import Arrived, Rejected, Ticked
from llmkernel.rejected import read_rejected, reject
from llmkernel.testkit.rig import Rig
from llmproto import limits, wire
from llmproto.base import Header
from llmproto.execution import Stepped
from llmproto.kinds import KIND_OF
from llmproto.operation import StatusAsk

STEPPED = Stepped([b"thread01"], [1], [3], [5], [0], 10)


def arrived(peer: bytes, message: StatusAsk | Stepped, id: bytes = b"i" * 16) -> Arrived:
    header = Header(limits.PROTOCOL_VERSION, KIND_OF[type(message)], id)
    return Arrived(peer, tuple(wire.encode(header, message)))


def test_a_message_is_known_again_by_its_id(tmp_path: Path) -> None:
    tables = Rig().kernel.tables
    reject(tmp_path / "r", tables, arrived(b"peer", StatusAsk()), ValueError("broken"))
    assert read_rejected(tmp_path / "r", forget_processes=False) == (Rejected(b"i" * 16),)
    assert "broken" in (tmp_path / "r" / "000000000001.txt").read_text()


def test_a_service_that_sent_it_is_named(tmp_path: Path) -> None:
    rig = Rig()
    tokenizer = rig.tokenizer()
    reject(tmp_path, rig.kernel.tables, arrived(tokenizer.peer, STEPPED), ValueError())
    (found,) = read_rejected(tmp_path, forget_processes=False)
    assert found == Rejected(b"i" * 16, "tokenizer", 1, (b"thread01",), 1)


def test_deaths_of_the_same_thread_are_counted(tmp_path: Path) -> None:
    rig = Rig()
    for _ in range(2):
        reject(tmp_path, rig.kernel.tables, arrived(b"peer", STEPPED), ValueError())
        rig.restart()
    assert [r.deaths for r in read_rejected(tmp_path, forget_processes=False)] == [1, 2]


def test_what_is_no_message_is_only_written_down(tmp_path: Path) -> None:
    reject(tmp_path, Rig().kernel.tables, Ticked(), ValueError())
    reject(tmp_path, Rig().kernel.tables, Arrived(b"p", (b"\xc1", b"")), ValueError())
    assert read_rejected(tmp_path, forget_processes=False) == ()
    assert (tmp_path / "000000000001.event").exists()


def test_an_unreadable_step_names_no_thread(tmp_path: Path) -> None:
    header = Header(limits.PROTOCOL_VERSION, KIND_OF[Stepped], b"i" * 16)
    event = Arrived(b"p", (wire.encode_header(header), b"\xc1"))
    reject(tmp_path, Rig().kernel.tables, event, ValueError())
    assert read_rejected(tmp_path, forget_processes=False) == (Rejected(b"i" * 16),)


def test_senders_of_an_earlier_init_are_forgotten_for_good(tmp_path: Path) -> None:
    # Names and incarnations are given again: a healthy process would be killed.
    rig = Rig()
    tokenizer = rig.tokenizer()
    reject(tmp_path, rig.kernel.tables, arrived(tokenizer.peer, STEPPED), ValueError())
    for first in (True, False):
        (found,) = read_rejected(tmp_path, forget_processes=first)
        assert found == Rejected(b"i" * 16, "", 0, (b"thread01",), 1)


def test_only_the_latest_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rejected, "KEPT_MAX", 2)
    rig = Rig()
    for number in range(4):
        event = arrived(b"peer", StatusAsk(), bytes([number]) * 16)
        reject(tmp_path, rig.kernel.tables, event, ValueError())
        rig.restart()
    kept = read_rejected(tmp_path, forget_processes=False)
    assert [r.message[0] for r in kept] == [2, 3]
    assert len(list(tmp_path.iterdir())) == 6


def test_nothing_where_no_kernel_has_died(tmp_path: Path) -> None:
    assert read_rejected(tmp_path / "none", forget_processes=True) == ()
