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
from llmproto.jobs import JobState
from llmproto.operation import ThreadState

FOLDER = Path(__file__).with_name("golden")


def make_facts() -> ModuleType:
    """The script that wrote the file, for what it meant."""
    spec = importlib.util.spec_from_file_location("make_facts", FOLDER / "make_facts.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read(name: str, tmp_path: Path) -> list[bytes]:
    shutil.copyfile(FOLDER / f"{name}.bin", segments.path_of(tmp_path, 1))
    journal, found = Journal.open(tmp_path, Options(bytes_max=1 << 22, segment_bytes=1 << 16))
    payloads = [bytes(record) for record in found]
    journal.close()
    return payloads


@pytest.fixture
def records(tmp_path: Path) -> list[bytes]:
    return read("facts-format-1", tmp_path)


def test_every_kind_of_fact_is_in_them(tmp_path: Path) -> None:
    kinds: set[type] = set()
    for name in make_facts().SETS:
        (tmp_path / name).mkdir()
        for record in read(name, tmp_path / name):
            kinds |= {type(fact) for fact in turns.decode(record)}
    assert kinds == set(facts.AnyFact.__args__)


@pytest.mark.parametrize("name", list(make_facts().SETS))
def test_the_records_say_what_was_meant(name: str, tmp_path: Path) -> None:
    meant = make_facts().SETS[name]()
    assert [turns.decode(record) for record in read(name, tmp_path)] == meant


def test_the_jobs_that_they_make(tmp_path: Path) -> None:
    state = State()
    for record in read("jobs-format-1", tmp_path):
        for fact in turns.decode(record):
            state.apply(fact)
    state.check()
    first, second = state.jobs
    assert (first.name, first.state, first.attempt) == ("bot", JobState.SUSPENDED, 2)
    assert (first.checkpoint_step, first.position, first.step) == (1, 8, 2)
    assert [report.loss for report in first.beyond] == [2.25]
    assert (first.deaths, first.losses, first.priority) == (1, 2, 4)
    assert (second.state, second.error, second.detail, second.metrics) == (
        JobState.FAILED,
        ErrorKind.INVALID,
        "line 3",
        {"loss": 1.5},
    )
    assert state.now_ns == 6_000


def test_the_deployments_that_they_make(tmp_path: Path) -> None:
    state = State()
    for record in read("deployments-format-1", tmp_path):
        for fact in turns.decode(record):
            state.apply(fact)
    state.check()
    assert list(state.deployments) == ["bot"]
    bot = state.deployments["bot"]
    assert (bot.model, bot.serving, bot.detail) == ("bot@0000bbbb", "bot@0000aaaa", "it is damaged")
    assert list(state.retired) == ["bot@0000cccc"]
    (thread,) = state.threads
    assert (thread.model, thread.deployment) == ("bot@0000aaaa", "bot")


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
