"""Upgrade: a journal that a kernel of format 1 wrote is read by this one."""

import importlib.util
import shutil
from pathlib import Path
from types import ModuleType

import pytest
from llmkernel import facts, segments, turns
from llmkernel.journal import Journal, Options
from llmkernel.state import State
from llmproto.errors import ErrorKind
from llmproto.operation import ThreadState

GOLDEN = Path(__file__).with_name("golden") / "facts-format-1.bin"


def make_facts() -> ModuleType:
    """The script that wrote the file, for what it meant."""
    spec = importlib.util.spec_from_file_location("make_facts", GOLDEN.with_name("make_facts.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def records(tmp_path: Path) -> list[bytes]:
    shutil.copyfile(GOLDEN, segments.path_of(tmp_path, 1))
    journal, found = Journal.open(tmp_path, Options(bytes_max=1 << 22, segment_bytes=1 << 16))
    payloads = [bytes(record) for record in found]
    journal.close()
    return payloads


def test_every_kind_of_fact_is_in_it(records: list[bytes]) -> None:
    kinds = {type(fact) for record in records for fact in turns.decode(record)}
    assert kinds == set(facts.AnyFact.__args__)


def test_the_records_say_what_was_meant(records: list[bytes]) -> None:
    meant = make_facts().all_facts()
    assert [turns.decode(record) for record in records] == meant


def test_the_state_that_they_make(records: list[bytes]) -> None:
    state = State()
    for record in records:
        for fact in turns.decode(record):
            state.apply(fact)
    state.check()
    assert (state.epoch, state.now_ns) == (2, 3_000)
    assert state.tenants == {1: "uid:1000", 2: "key:alice"}
    assert list(state.keys) == ["alice"]
    assert [(name, one.default) for name, one in state.models.items()] == [("small", True)]
    first, ended, suspended = (
        state.threads.by_id[b"\0\0\0\1\0\0\0" + bytes([n])] for n in (0, 2, 3)
    )
    assert list(first.tokens) == [1, 300, 31_999, 7]
    assert first.scores is not None and first.scores[0].top_tokens == [7, 8]
    assert (ended.state, list(ended.tokens)) == (ThreadState.ENDED, [1, 300, 31_999, 2])
    assert (suspended.suspended, suspended.session, suspended.priority) == (True, b"t" * 16, 7)
    assert b"\0\0\0\1\0\0\0\1" not in state.threads.by_id
    assert {place[1] for place in state.spent} == {b"z" * 16, (1).to_bytes(16)}


def test_an_error_keeps_its_kind(records: list[bytes]) -> None:
    found = [fact for record in records for fact in turns.decode(record)]
    (failed,) = [f for f in found if isinstance(f, facts.ThreadEnded) and f.error is not None]
    assert (failed.error, failed.detail) == (ErrorKind.INTERNAL, "it died of it")
