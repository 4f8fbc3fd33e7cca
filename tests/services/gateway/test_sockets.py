"""Addresses: one system's workers share a port, nobody else gets it."""

import socket
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from llmproto.errors import ErrorKind, RemoteError
from llmservices.gateway.sockets import bind, bind_any, is_loopback, url

HOST = "127.0.0.1"


@pytest.fixture
def port() -> Iterator[int]:
    """One that is free, as far as one can know."""
    with closing(bind(HOST, 0, shared_lock=None)) as found:
        number = found.getsockname()[1]
    yield number


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.0.0.1", True), ("localhost", True), ("::1", True), ("10.0.0.1", False), ("x", False)],
)
def test_loopback(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


def test_address() -> None:
    with closing(bind(HOST, 0, shared_lock=None)) as found:
        assert url(found) == f"http://127.0.0.1:{found.getsockname()[1]}"


def test_a_port_that_is_taken(port: int) -> None:
    with closing(bind(HOST, port, shared_lock=None)), pytest.raises(RemoteError) as caught:
        bind(HOST, port, shared_lock=None)
    assert caught.value.kind is ErrorKind.EXHAUSTED
    assert str(port) in caught.value.detail
    assert "[gateway] port" in caught.value.detail


def test_any_port_is_the_same_again(tmp_path: Path) -> None:
    memory = tmp_path / "gateway.port"
    with closing(bind_any(HOST, memory)) as first:
        address = first.getsockname()
        with closing(bind_any(HOST, memory)) as second:
            other = second.getsockname()
    assert other != address
    with closing(bind_any(HOST, memory)) as third:
        assert third.getsockname() == other
    memory.write_text("nonsense")
    with closing(bind_any(HOST, memory)) as fourth:
        assert fourth.getsockname()[1]


def test_workers_share(port: int, tmp_path: Path) -> None:
    lock = tmp_path / "gateway.lock"
    with closing(bind(HOST, port, shared_lock=lock)), closing(bind(HOST, port, shared_lock=lock)):
        pass


def test_another_system_does_not_share(port: int, tmp_path: Path) -> None:
    with closing(bind(HOST, port, shared_lock=tmp_path / "one")), pytest.raises(RemoteError):
        bind(HOST, port, shared_lock=tmp_path / "two")


def test_a_host_that_is_not_ours() -> None:
    with pytest.raises(RemoteError) as caught:
        bind("no.such.host.invalid", 0, shared_lock=None)
    assert caught.value.kind is ErrorKind.INVALID
    with pytest.raises(RemoteError):
        bind("192.0.2.1", 0, shared_lock=None)  # a documentation address


def test_two_systems_without_workers(port: int) -> None:
    with closing(socket.create_server((HOST, port))), pytest.raises(RemoteError):
        bind(HOST, port, shared_lock=None)
