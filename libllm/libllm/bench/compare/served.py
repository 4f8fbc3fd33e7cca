"""The servers that are put under a load: each is started, has a URL, and is stopped."""

import asyncio
import os
import signal
import socket
from collections.abc import Sequence
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Final, Protocol

import aiohttp
from llmproto.errors import ErrorKind, RemoteError

from libllm.bench.compare.peers import NAME
from libllm.bench.compare.weights import Weights, config_of
from libllm.bench.system import generate, prompt_of, system

START_S: Final = 600.0
"""An engine that loads and compiles."""
ASK_S: Final = 0.5
CONTEXT_TOKENS: Final = 4096


class Served(Protocol):
    """A server with one model, which it calls NAME."""

    @property
    def name(self) -> str: ...

    @property
    def ours(self) -> bool: ...

    async def start(self) -> str:
        """Its base URL, once it answers.  UNAVAILABLE says why it does not."""

    async def stop(self) -> None:
        """End it."""


class OursServed:
    """This system behind its gateway."""

    ours = True

    def __init__(self, folder: Path, config: str, weights: Weights) -> None:
        self.name = "llmos" if weights == "auto" else f"llmos-{weights}"
        self._folder = folder
        self._config = config_of(config, weights)
        self._stack = AsyncExitStack()

    async def start(self) -> str:
        """As Served says."""
        client, home, _ = await self._stack.enter_async_context(system(self._config))
        await client.add_model(self._folder, NAME)
        await generate(client, prompt_of(16, 1), 2, NAME)
        return f"http://127.0.0.1:{(home.run / 'gateway.port').read_text().strip()}"

    async def stop(self) -> None:
        """As Served says."""
        await self._stack.aclose()


class VllmServed:
    """vLLM's OpenAI-compatible server, with its own defaults but for a context it has room for."""

    ours = False

    def __init__(
        self, name: str, python: Path, arguments: Sequence[str], environment: dict[str, str]
    ) -> None:
        self.name = name
        self._port = _free_port()
        self._command = [
            *(str(python), "-m", "vllm.entrypoints.openai.api_server"),
            *("--served-model-name", NAME),
            *("--host", "127.0.0.1", "--port", str(self._port)),
            *("--max-model-len", str(CONTEXT_TOKENS), *arguments),
        ]
        self._environment = environment
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> str:
        """As Served says."""
        url = f"http://127.0.0.1:{self._port}"
        try:
            self._process = await asyncio.create_subprocess_exec(
                *self._command,
                stdout=asyncio.subprocess.DEVNULL,
                env={**os.environ, **self._environment},
                start_new_session=True,  # an engine's own processes end with it
            )
        except OSError as error:
            raise self._absent(f"{self._command[0]}: {error.strerror}") from None
        try:
            async with asyncio.timeout(START_S), aiohttp.ClientSession(url) as session:
                while not await _healthy(session):
                    if self._process.returncode is not None:
                        raise self._absent(f"it ended with exit code {self._process.returncode}")
                    await asyncio.sleep(ASK_S)
        except TimeoutError:
            raise self._absent(f"it was not up in {START_S} s") from None
        return url

    async def stop(self) -> None:
        """As Served says."""
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            await self._process.wait()

    def _absent(self, why: str) -> RemoteError:
        return RemoteError(ErrorKind.UNAVAILABLE, f"{self.name}: {why}")


async def _healthy(session: aiohttp.ClientSession) -> bool:
    try:
        async with session.get("/health") as response:
            return response.status == 200
    except aiohttp.ClientError:
        return False


def _free_port() -> int:
    """One that nobody has now."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])
