"""A system that other machines reach: a client and a service over tcp, in a home of their own."""

import asyncio
import os
import shutil
import socket
import sys
from asyncio.subprocess import DEVNULL
from pathlib import Path

import pytest
from libllm.client import connect_async
from libllm.config import child_environment
from libllm.remote import Remote
from llmproto.errors import ErrorKind, RemoteError

from .conftest import EXACT, Boot
from .load import complete_all, load
from .plugin.llmos_echo import KINDS, Ask, Said

PLUGIN = Path(__file__).parent / "plugin"


def free_url() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return f"tcp://127.0.0.1:{found.getsockname()[1]}"


async def test_a_client_and_a_service_of_other_machines(booted: Boot, tmp_path: Path) -> None:
    url = free_url()
    system = await asyncio.to_thread(booted, f'[kernel]\nlisten = "{url}"\n' + EXACT)
    assert system.home.connection.stat().st_mode & 0o777 == 0o600
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    copy = elsewhere / "connection.json"
    shutil.copy(system.home.connection, copy)
    environment = child_environment() | {
        "LLMOS_HOME": str(elsewhere),
        "LLMOS_CONNECTION": str(copy),
    }
    environment["PYTHONPATH"] = os.pathsep.join([str(PLUGIN), environment["PYTHONPATH"]])
    command = (sys.executable, "-m", "llmos_echo")
    service = await asyncio.create_subprocess_exec(*command, env=environment, stderr=DEVNULL)
    asks = load(4, 40)
    try:
        async with (
            await connect_async(elsewhere, connection=copy) as far,
            system.client() as near,
        ):
            blobs = [os.urandom(500_000), b""]
            found = await far.exchange("echo", Ask("far"), Said, kinds=KINDS, blobs=blobs)
            assert found == (Said("far", service.pid), tuple(reversed(blobs)))
            twins = await complete_all(near, asks)
            disturbed = asyncio.create_task(complete_all(far, asks))
            await asyncio.sleep(0)
            await near.kill("kernel")  # Everybody comes back to the same address and key.
            for ours, theirs in zip(await disturbed, twins, strict=True):
                assert (ours.text, ours.tokens) == (theirs.text, theirs.tokens)
            assert (await near.call("echo", Ask("x"), Said, kinds=KINDS)).pid == service.pid
            assert Remote.read(system.home.connection) == Remote.read(copy)
            with pytest.raises(RemoteError) as refused:
                await connect_async(elsewhere, url=url, proof=b"x" * 32)
            assert refused.value.kind is ErrorKind.INVALID
            key = Remote.read(copy).server_key
            with pytest.raises(RemoteError) as refused:
                await connect_async(elsewhere, url=url, server_key=key, proof=b"x" * 32)
            assert refused.value.kind is ErrorKind.DENIED
    finally:
        service.terminate()
        code = await service.wait()
    assert code == 0
    async with system.client() as near:
        await system.until_settled(near)
