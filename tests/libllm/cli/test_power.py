"""up, down, status."""

from llmproto.errors import ErrorKind, RemoteError

from .conftest import CommandLine, FakeSystem


def test_up_tells_where(llmos: CommandLine, system: FakeSystem) -> None:
    system.runs = False
    done = llmos("up", "--timeout", "9")
    assert system.did[0] == ("boot", 9.0)
    assert done.stdout.splitlines()[0].endswith(f"runs in {system.folder}")
    assert f"ipc://{system.folder}/run/kernel.sock" in done.stdout
    assert "http     http://127.0.0.1:8750/v1\n" in done.stdout
    assert "embedded (ready)" in done.stdout


def test_a_second_up_is_no_error(llmos: CommandLine, system: FakeSystem) -> None:
    done = llmos("up")
    assert done.code == 0
    assert f"runs already in {system.folder}" in done.stdout
    document = llmos("up", "--json").document()
    assert isinstance(document, dict)
    assert document["booted"] is False
    assert document["http"] == "http://127.0.0.1:8750/v1"


def test_the_reason_of_a_failed_boot(llmos: CommandLine, system: FakeSystem) -> None:
    system.runs = False
    system.refusal = RemoteError(ErrorKind.UNAVAILABLE, "port 8750 is taken")
    done = llmos("up")
    assert (done.code, done.stdout) == (1, "")
    assert done.stderr == "llmos: UNAVAILABLE: port 8750 is taken\n"


def test_foreground_becomes_init(llmos: CommandLine, system: FakeSystem) -> None:
    assert llmos("up", "--foreground").code == 0
    assert system.did == ["become"]


def test_down(llmos: CommandLine, system: FakeSystem) -> None:
    assert llmos("down").stdout == f"llmos in {system.folder} has ended\n"
    again = llmos("down")
    assert (again.code, again.stdout) == (0, f"no system runs in {system.folder}\n")


def test_status(llmos: CommandLine, system: FakeSystem) -> None:
    done = llmos("status")
    assert done.code == 0
    assert done.stdout.startswith("llmos 9.9.9: ready\n")
    assert done.stdout.splitlines()[-1].split() == ["llmos_tokens_committed_total", "7"]
    system.operator.ready = False
    done = llmos("status")
    assert done.code == 1
    assert done.stdout.startswith("llmos 9.9.9: not ready (gateway: starting)\n")


def test_status_as_a_document(llmos: CommandLine) -> None:
    document = llmos("status", "--json").document()
    assert isinstance(document, dict)
    assert document["ready"] is True
    assert [measure["value"] for measure in document["metrics"]] == [3.0, 4.0]
