"""Addresses of other machines: what is listened on, what is connected to, and the file between."""

import ipaddress
from pathlib import Path

import msgspec
import pytest
from libllm.config import Home, ProcessEnvironment, SystemConfig
from libllm.connection import open_connection
from libllm.remote import Remote, check_listen, check_sealed
from llmproto.errors import ErrorKind, RemoteError

KEY = "rq:rM>}U?@Lns47E1%kR.o@n%FcmmsL/@{H8]yf7"
REMOTE = Remote("tcp://10.0.0.7:8751", KEY, "00ff", "0a" * 32)


@pytest.mark.parametrize(
    "url", ["tcp://127.0.0.1:8751", "tcp://192.168.7.9:1", "tcp://[::1]:65535", "tcp://[fe80::1]:9"]
)
def test_an_address_that_is_named_is_listened_on(url: str) -> None:
    check_listen(url)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("tcp://*:8751", "every network"),
        (f"tcp://{ipaddress.IPv4Address(0)}:8751", "every network"),
        ("tcp://[::]:8751", "every network"),
        ("tcp://[::ffff:0:0]:8751", "every network"),
        ("tcp://:8751", "every network"),
        ("tcp://localhost:8751", "IP address"),
        ("tcp://eth0:8751", "IP address"),
        ("tcp://127.0.0.1:0", "from 1 to 65535"),
        ("tcp://127.0.0.1:*", "from 1 to 65535"),
        ("tcp://127.0.0.1:65536", "from 1 to 65535"),
        ("udp://127.0.0.1:8751", "tcp://ADDRESS:PORT"),
        ("127.0.0.1:8751", "tcp://ADDRESS:PORT"),
    ],
)
def test_any_other_is_refused_in_the_configuration(tmp_path: Path, url: str, words: str) -> None:
    path = tmp_path / "config.toml"
    path.write_text(f'[kernel]\nlisten = "{url}"\n')
    with pytest.raises(RemoteError) as refused:
        SystemConfig.read(path)
    assert refused.value.kind is ErrorKind.INVALID
    for word in (str(path), "$.kernel", words):
        assert word in refused.value.detail


def test_nothing_is_listened_on_by_default() -> None:
    assert SystemConfig().kernel.listen is None


@pytest.mark.parametrize(
    ("url", "key"), [("tcp://127.0.0.1:8751", None), ("http://x", None), ("ipc:///x", KEY)]
)
def test_a_proof_leaves_the_machine_encrypted_or_not_at_all(url: str, key: str | None) -> None:
    with pytest.raises(RemoteError, match="server_key") as refused:
        check_sealed(url, key)
    assert refused.value.kind is ErrorKind.INVALID


@pytest.mark.parametrize(
    ("url", "key"),
    [
        ("tcp://127.0.0.1:8751", None),
        ("tcp://127.0.0.1:8751", "short"),
        ("tcp://127.0.0.1:8751", "é" * 40),
        ("tcp://127.0.0.1", KEY),
        ("smoke://signal", KEY),
    ],
)
async def test_a_connection_that_cannot_be_is_refused_at_once(
    home: Home, url: str, key: str | None
) -> None:
    with pytest.raises(RemoteError) as refused:
        await open_connection(home, url=url, server_key=key, proof=b"p")
    assert refused.value.kind is ErrorKind.INVALID


def test_a_connection_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "connection.json"
    path.write_bytes(msgspec.json.encode(REMOTE))
    assert Remote.read(path) == REMOTE
    path.write_text(f'{{"url": "tcp://h:1", "server_key": "{KEY}", "later": 1}}')
    assert Remote.read(path) == Remote("tcp://h:1", KEY)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"url": "tcp://h:1"}',
        '{"url": "tcp://h:1", "server_key": "x"}',
        f'{{"url": "tcp://h:1", "server_key": "{KEY}", "operator": "xyz"}}',
        f'{{"url": "tcp://h:1", "server_key": "{KEY}", "operator": "abc"}}',
        f'{{"url": "ipc:///h", "server_key": "{KEY}"}}',
    ],
)
def test_a_file_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "connection.json"
    path.write_text(text)
    with pytest.raises(RemoteError) as refused:
        Remote.read(path)
    assert refused.value.kind is ErrorKind.INVALID
    with pytest.raises(RemoteError, match=r"absent\.json"):
        Remote.read(tmp_path / "absent.json")


def test_a_service_on_another_machine_is_told_by_its_environment(tmp_path: Path) -> None:
    path = tmp_path / "connection.json"
    path.write_bytes(msgspec.json.encode(REMOTE))
    values = {"LLMOS_HOME": str(tmp_path), "LLMOS_CONNECTION": str(path)}
    environment = ProcessEnvironment.read(values)
    assert environment.proof == b"\n" * 32
    assert (environment.endpoint, environment.server_key) == (REMOTE.url, KEY)
    local = ProcessEnvironment.read({"LLMOS_HOME": str(tmp_path)})
    assert (local.endpoint, local.server_key) == (local.home.endpoint, None)
