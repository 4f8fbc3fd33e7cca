"""The world behind the command line, as far as it needs no running system."""

from pathlib import Path

import pytest
from libllm.cli.real import RealSystem, is_hopeless, why_hopeless
from libllm.config import Home
from llmproto.errors import ErrorKind, RemoteError
from llmproto.operation import ProcessRow, ProcessState


def row(state: ProcessState, incarnation: int) -> ProcessRow:
    return ProcessRow(
        name="gateway",
        role="gateway",
        pid=None,
        state=state,
        incarnation=incarnation,
        uptime_ms=0,
    )


@pytest.mark.parametrize(
    ("state", "incarnation", "expected"),
    [
        (ProcessState.STARTING, 1, False),
        (ProcessState.WAITING, 3, False),
        (ProcessState.WAITING, 4, True),
        (ProcessState.READY, 9, False),
        (ProcessState.QUARANTINED, 1, True),
    ],
)
def test_what_is_hopeless(state: ProcessState, incarnation: int, expected: bool) -> None:
    assert is_hopeless(row(state, incarnation)) is expected


def test_the_reason_is_in_the_words_of_its_log(tmp_path: Path) -> None:
    home = Home(tmp_path)
    home.logs.mkdir()
    line = '{"event": "cannot_start", "level": "error", "detail": "port 1 is taken"}\n'
    (home.logs / "gateway.log").write_text(line)
    why = why_hopeless(home, row(ProcessState.WAITING, 4))
    assert why.startswith("gateway ended 4 times before it was ready")
    assert 'cannot_start  detail="port 1 is taken"' in why
    assert str(home.logs / "gateway.log") in why


def test_nothing_runs_in_an_empty_home(tmp_path: Path) -> None:
    system = RealSystem()
    home = system.home(str(tmp_path / "home"))
    assert not system.is_running(home)
    assert system.stop(home) is False
    with pytest.raises(RemoteError, match="llmos up") as caught:
        system.connect(home)
    assert caught.value.kind is ErrorKind.UNAVAILABLE
    assert not home.root.exists()


def test_a_wrong_configuration_is_refused_before_anything_starts(tmp_path: Path) -> None:
    home = Home(tmp_path)
    home.config.write_text("[gateway]\nprt = 1\n")
    with pytest.raises(RemoteError, match="prt"):
        RealSystem().boot(home, timeout_s=1.0)
    with pytest.raises(RemoteError, match="prt"):
        RealSystem().become(home)
    assert [path.name for path in tmp_path.iterdir()] == ["config.toml"]
