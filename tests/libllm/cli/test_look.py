"""ps, threads, models, top: tables for people, documents for programs."""

from llmproto.errors import ErrorKind, RemoteError

from .conftest import THREAD, CommandLine, FakeSystem


def test_ps(llmos: CommandLine) -> None:
    head, kernel, executor, _ = llmos("ps").stdout.splitlines()
    assert head.split() == ["NAME", "PID", "STATE", "INC", "UPTIME", "LEASE", "THR", "DOING"]
    assert kernel.split() == ["kernel", "11", "ready", "1", "1m02s", "-", "-"]
    assert executor.split()[-10:-5] == ["cpu:2", "1.0", "GB", "1", "embedded"]
    assert executor.split()[-5:] == ["bfloat16", "cpu", "native", "avx512_bf16", "fast"]


def test_ps_as_a_document(llmos: CommandLine) -> None:
    rows = llmos("ps", "--json").document()
    assert isinstance(rows, list)
    assert rows[0]["name"] == "kernel"
    assert set(rows[1]) >= {"name", "pid", "state", "incarnation", "lease", "uptime_ms"}


def test_threads(llmos: CommandLine) -> None:
    line = llmos("threads").stdout.splitlines()[1]
    assert line.split() == [
        *(THREAD.hex(), "running", "embedded", "owner"),
        *("4+17/64", "interactive+2", "900ms", "executor-1"),
    ]
    rows = llmos("threads", "--json").document()
    assert isinstance(rows, list)
    assert rows[0]["thread"] == THREAD.hex()


def test_models(llmos: CommandLine) -> None:
    lines = llmos("models").stdout.splitlines()
    assert lines[1].split()[:6] == ["embedded", "ready", "512", "1.0", "MB", "chat"]
    found = llmos("models", "--json").document()
    assert isinstance(found, dict)
    assert [row["model"]["name"] for row in found["models"]] == ["embedded", "plain"]
    assert [row["name"] for row in found["deployments"]] == ["bot"]
    assert [row["reference"] for row in found["versions"]] == ["bot@3f2a0b1c"]


def test_models_shows_what_is_deployed_and_what_is_stored(llmos: CommandLine) -> None:
    words = [line.split() for line in llmos("models").stdout.splitlines()]
    (deployed,) = (line for line in words if line[:2] == ["bot", "live"])
    assert deployed[2:6] == ["bot@3f2a0b1c", "bot@00000001", "1/1", "any"]
    (version,) = (line for line in words if line[0] == "bot@3f2a0b1c")
    assert version[1:8] == ["prod", "bot", "3.0", "MB", "1.0", "MB", "@aabbccdd"]
    assert version[-2:] == ["accuracy", "0.875"]


def test_models_without_a_store_says_so(llmos: CommandLine, system: FakeSystem) -> None:
    system.operator.store_down = RemoteError(ErrorKind.UNAVAILABLE, "store is down")
    done = llmos("models")
    assert (done.code, "embedded" in done.stdout) == (0, True)
    assert "the store does not answer: store is down" in done.stderr
    system.operator.store_down = RemoteError(ErrorKind.DENIED, "no")
    assert llmos("models").code == 1


def test_top_off_a_terminal_is_printed_once_a_look(llmos: CommandLine) -> None:
    done = llmos("top", "--count", "2", "--interval", "0.1")
    assert done.stdout.count("llmos 9.9.9: ready") == 2
    assert done.stdout.count("executor-1") == 4  # as a process, and where the thread is
    lines = llmos("top", "--count", "2", "--interval", "0.1", "--json").stdout.splitlines()
    assert len(lines) == 2
