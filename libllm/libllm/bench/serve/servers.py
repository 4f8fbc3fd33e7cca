"""The ways to ask: an OpenAI-compatible server over HTTP, or a system through libllm."""

import json
from collections.abc import Callable
from typing import Final, Literal, Protocol

import aiohttp
import msgspec
from llmproto.errors import RemoteError, invalid

from libllm.bench.serve.timeline import Timeline
from libllm.bench.serve.workload import Ask
from libllm.client import AsyncClient, open_client
from libllm.config import Home

LINE_BYTES_MAX: Final = 4 << 20
"""One event of a stream; aiohttp reads lines up to its buffer's size."""
ANSWER_S: Final = 3600.0
WORDS: Final = """
the of and to in is that it was for on are as with his they at be this have from or one had by word
but not what all were we when your can said there use an each which she do how their if will up
other about out many then them these so some her would make like him into time
""".split()  # noqa: SIM905 - a list of words would take a page
"""Text for servers that take no token ids: about one token a word."""

Clock = Callable[[], float]


class Target(msgspec.Struct, frozen=True):
    """Whom to ask."""

    kind: Literal["http", "system"]
    url: str = ""
    """Of HTTP: the base, with or without /v1."""
    home: str = ""
    """Of a system; empty: the default home."""
    model: str | None = None
    api: Literal["completions", "chat"] = "completions"
    text: bool = False
    """Send words, not token ids."""
    key: str = ""


class Server(Protocol):
    """Answers asks, many at once."""

    async def answer(self, ask: Ask, line: Timeline, clock: Clock) -> None:
        """Fill in the timeline; raises whatever went wrong."""

    async def close(self) -> None:
        """Let go of its connections."""


async def connect(target: Target) -> Server:
    """A server that is there to be asked."""
    if target.kind == "system":
        return LibllmServer(await open_client(Home.find(target.home or None)), target.model)
    return await HttpServer.open(target)


class LibllmServer:
    """A system of this machine through libllm."""

    def __init__(self, client: AsyncClient, model: str | None) -> None:
        self._client = client
        self._model = model

    async def answer(self, ask: Ask, line: Timeline, clock: Clock) -> None:
        """As Server says."""
        line.sent_s = clock()
        stream = await self._client.generate(
            ask.prompt,
            stream=True,
            model=self._model,
            max_tokens=ask.output_tokens,
            temperature=0.0,
            ignore_eos=True,
        )
        async for piece in stream:
            if piece.tokens > line.output_tokens:
                line.arrivals_s.append(clock())
                line.output_tokens = piece.tokens
        line.prompt_tokens = len(ask.prompt)

    async def close(self) -> None:
        """Say goodbye."""
        await self._client.aclose()


class HttpServer:
    """Any server that speaks OpenAI's protocol with server-sent events."""

    def __init__(self, target: Target, session: aiohttp.ClientSession, model: str) -> None:
        self._session = session
        self._target = target
        self._model = model

    @classmethod
    async def open(cls, target: Target) -> "HttpServer":
        """The model is the server's first, where none is named."""
        base = target.url.rstrip("/").removesuffix("/v1") + "/"
        headers = {"Authorization": f"Bearer {target.key}"} if target.key else {}
        session = aiohttp.ClientSession(
            base_url=base,
            headers=headers,
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=ANSWER_S),
            read_bufsize=LINE_BYTES_MAX,
        )
        try:
            model = target.model or await _first_model(session)
        except BaseException:
            await session.close()
            raise
        return cls(target, session, model)

    async def answer(self, ask: Ask, line: Timeline, clock: Clock) -> None:
        """As Server says."""
        path, body = self._request(ask)
        line.sent_s = clock()
        async with self._session.post(path, json=body) as response:
            if response.status != 200:
                detail = (await response.text())[:200]
                raise RuntimeError(f"HTTP {response.status}: {detail}")
            pieces = 0
            async for raw in response.content:
                if not raw.startswith(b"data:"):
                    continue
                data = raw[5:].strip()
                if data == b"[DONE]":
                    break
                event = json.loads(data)
                if _has_text(event):
                    line.arrivals_s.append(clock())
                    pieces += 1
                usage = event.get("usage")
                if usage:
                    line.output_tokens = usage["completion_tokens"]
                    line.prompt_tokens = usage["prompt_tokens"]
                    details = usage.get("prompt_tokens_details") or {}
                    line.cached_tokens = details.get("cached_tokens")
            line.output_tokens = line.output_tokens or pieces

    def _request(self, ask: Ask) -> tuple[str, dict[str, object]]:
        body: dict[str, object] = {
            "model": self._model,
            "max_tokens": ask.output_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        words = " ".join(WORDS[one % len(WORDS)] for one in ask.prompt)
        if self._target.api == "chat":
            return "v1/chat/completions", {
                **body,
                "messages": [{"role": "user", "content": words}],
            }
        return "v1/completions", {**body, "prompt": words if self._target.text else ask.prompt}

    async def close(self) -> None:
        """Close the connections."""
        await self._session.close()


def _has_text(event: dict[str, list[dict[str, object]]]) -> bool:
    """Whether the event carries part of an answer (a token may be no text yet: it counts)."""
    for choice in event.get("choices") or ():
        if "text" in choice:
            return True
        delta = choice.get("delta")
        if isinstance(delta, dict) and delta.get("content") is not None and delta["content"] != "":
            return True
    return False


async def _first_model(session: aiohttp.ClientSession) -> str:
    try:
        async with session.get("v1/models") as response:
            models = (await response.json())["data"]
            return str(models[0]["id"])
    except (aiohttp.ClientError, KeyError, IndexError, ValueError) as error:
        raise invalid(
            f"{session._base_url}v1/models does not name a model ({error!r}): "
            "is the server up? --model names one"
        ) from None


def reason(error: BaseException) -> str:
    """One line, the same for the same kind of failure."""
    if isinstance(error, RemoteError):
        return f"{error.kind.value}: {error.detail[:80]}"
    return f"{type(error).__name__}: {str(error)[:80]}"
