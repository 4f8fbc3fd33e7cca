"""The gateway's process, without the process: it listens, says where, and stops."""

from pathlib import Path

import httpx
import pytest
from libllm.config import GatewayConfig, Home, ProcessEnvironment
from libllm.events import Event
from libllm.port import Port
from llmproto.errors import RemoteError
from llmservices.gateway.service import GatewayService


def service(tmp_path: Path, config: GatewayConfig) -> GatewayService:
    """In a home of its own, on a connection that is never made."""
    home = Home(tmp_path)
    home.make()
    fed: list[Event] = []
    environment = ProcessEnvironment(home=home, process="gateway")
    return GatewayService(Port(fed.append), environment=environment, config=config)


async def test_it_listens_until_it_is_told_to_stop(tmp_path: Path) -> None:
    gateway = service(tmp_path, GatewayConfig(port=0))
    await gateway.start()
    async with httpx.AsyncClient(base_url=gateway.address(), verify=False) as http:
        assert (await http.get("/openapi.json")).status_code == 200
    address = gateway.address()
    await gateway.drain()
    again = service(tmp_path, GatewayConfig(port=0))
    await again.start()
    assert again.address() == address
    await again.drain()


async def test_a_port_that_is_taken(tmp_path: Path) -> None:
    first = service(tmp_path / "one", GatewayConfig(port=0))
    await first.start()
    port = int(first.address().rpartition(":")[2])
    second = service(tmp_path / "two", GatewayConfig(port=port))
    with pytest.raises(RemoteError, match=f"port {port} of 127.0.0.1 is taken"):
        await second.start()
    await first.drain()


@pytest.mark.parametrize(
    ("config", "status"),
    [
        (GatewayConfig(port=0, keys_required=True), 401),
        (GatewayConfig(port=0, host="::1"), 404),
        (GatewayConfig(port=0, host="localhost"), 404),
    ],
)
async def test_keys_by_choice(tmp_path: Path, config: GatewayConfig, status: int) -> None:
    gateway = service(tmp_path, config)
    try:
        await gateway.start()
    except RemoteError:
        pytest.skip(f"no {config.host} here")
    async with httpx.AsyncClient(base_url=gateway.address(), verify=False) as http:
        assert (await http.get("/v1/streams/none")).status_code == status
    await gateway.drain()


@pytest.mark.parametrize(
    ("host", "required"), [("127.0.0.1", False), ("192.0.2.1", True), ("example.invalid", True)]
)
async def test_keys_by_force_beyond_loopback(tmp_path: Path, host: str, required: bool) -> None:
    assert service(tmp_path, GatewayConfig(host=host)).keys_required is required
