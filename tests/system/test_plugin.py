"""A plug-in service of its own kinds, in a real system: started by it, and by somebody else."""

import asyncio
import os
import signal
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from libllm.client import AsyncClient
from libllm.config import child_environment
from libllm.connection import open_connection
from llmproto import limits
from llmproto.errors import ErrorKind, RemoteError

from .conftest import Boot, System
from .plugin.llmos_echo import KINDS, Ask, Said

PLUGIN = Path(__file__).parent / "plugin"
WITH_ECHO = '[services]\nrun = ["monitor", "echo"]\n'
WITHOUT = '[services]\nrun = ["monitor"]\n'
BLOBS = [os.urandom(200_000), b"", b"\x00\xff" * 50]


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plug-in as an installer leaves it: on the path, its entry points in its metadata."""
    project = tomllib.loads((PLUGIN / "pyproject.toml").read_text())["project"]
    name, version = project["name"].replace("-", "_"), project["version"]
    described = tmp_path / f"{name}-{version}.dist-info"
    described.mkdir()
    metadata = f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {version}\n"
    (described / "METADATA").write_text(metadata)
    groups = project["entry-points"].items()
    lines = [f"[{group}]\n{key} = {at}\n" for group, found in groups for key, at in found.items()]
    (described / "entry_points.txt").write_text("".join(lines))
    path = [str(tmp_path), str(PLUGIN), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, path)))


async def ask(client: AsyncClient, message: Ask) -> Said:
    return await client.call("echo", message, Said, kinds=KINDS, deadline_s=30)


async def killed(system: System, client: AsyncClient, kill: Callable[[int], None]) -> None:
    """Die with two questions inside: who asked once is told UNAVAILABLE, who repeats is
    answered by the next incarnation."""
    first = await ask(client, Ask("first"))
    question = Ask("kept", not_by=first.pid)
    connection = await open_connection(system.home)
    port = connection.port
    once = asyncio.create_task(port.exchange(question, Said, target="echo", kinds=KINDS, once=True))
    repeated = asyncio.create_task(ask(client, question))
    await asyncio.sleep(0)  # Both have been said; what is answered behind them proves it.
    assert (await ask(client, Ask("x"))).pid == first.pid
    await port.exchange(Ask("x"), Said, target="echo", kinds=KINDS)
    kill(first.pid)
    with pytest.raises(RemoteError) as failed:
        await once
    assert failed.value.kind is ErrorKind.UNAVAILABLE
    second = await repeated
    assert second.text == "kept" and second.pid != first.pid
    connection.close()


@pytest.mark.usefixtures("installed")
async def test_a_plugin_that_the_system_starts(booted: Boot) -> None:
    system = await asyncio.to_thread(booted, WITH_ECHO)
    async with system.client() as client:
        (row,) = [row for row in await client.ps() if row.name == "echo"]
        assert row.role == "echo"
        said, blobs = await client.exchange("echo", Ask("hello"), Said, kinds=KINDS, blobs=BLOBS)
        assert said == Said("hello", row.pid or 0)
        assert blobs == tuple(reversed(BLOBS))
        with pytest.raises(RemoteError, match=str(limits.MESSAGE_BYTES_MAX)):
            await client.exchange(
                "echo", Ask("x"), Said, kinds=KINDS, blobs=[bytes(limits.MESSAGE_BYTES_MAX)]
            )
        with pytest.raises(RemoteError, match="is none") as refused:
            await client.call("monitor", Ask("x"), Said, kinds=KINDS)
        assert refused.value.kind is ErrorKind.INVALID
        await killed(system, client, lambda pid: os.kill(pid, signal.SIGKILL))
        await system.until_settled(client)


@pytest.mark.usefixtures("installed")
async def test_a_plugin_that_somebody_else_starts(booted: Boot) -> None:
    system = await asyncio.to_thread(booted, WITHOUT)
    children: list[subprocess.Popen[bytes]] = []

    def start() -> None:
        command = [sys.executable, "-m", "llmos_echo"]
        environment = {**child_environment(), "LLMOS_HOME": str(system.home.root)}
        children.append(subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL))

    def restart(pid: int) -> None:
        assert children[-1].pid == pid
        children[-1].kill()
        children[-1].wait()
        start()

    try:
        async with system.client() as client:
            asked = asyncio.create_task(ask(client, Ask("nobody is there yet")))
            await asyncio.sleep(0)
            await client.status()
            start()
            assert await asked == Said("nobody is there yet", children[0].pid)
            said, blobs = await client.exchange("echo", Ask(""), Said, kinds=KINDS, blobs=BLOBS)
            assert (said.text, blobs) == ("", tuple(reversed(BLOBS)))
            await killed(system, client, restart)
            assert [row.role for row in await client.ps() if row.role == "echo"] == ["echo"]
    finally:
        for child in children:
            child.terminate()
        codes = [child.wait() for child in children]
    assert codes == [-signal.SIGKILL, 0]
