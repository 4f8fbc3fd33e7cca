"""A gateway's HTTP server over a fake system, and the ways to talk to it."""

import array
import asyncio
import contextlib
from collections.abc import AsyncIterator

import httpx
import msgspec
import openai
import pytest_asyncio
from libllm.events import StreamRow
from libllm.vectors import Inputs, Part
from llmproto import limits, wire
from llmproto.base import Message
from llmproto.encoding import Encoded
from llmproto.errors import ErrorKind, RemoteError, invalid
from llmproto.generation import (
    Accepted,
    Attached,
    Generate,
    StreamEnd,
    TextScore,
    TokenizeAsk,
    Tokenized,
)
from llmproto.metrics import MetricsAsk, MetricsText
from llmproto.models import (
    DeploymentRow,
    Deployments,
    DeploymentsAsk,
    ModelAsk,
    ModelEntry,
    ModelFound,
    ModelRow,
    Models,
    ModelsAsk,
    ModelState,
)
from llmproto.operation import Status, StatusAsk
from llmproto.tenants import KeyPresent, KeyPresented
from llmproto.threads import Done, ThreadCancel
from llmservices.gateway.app import application
from llmservices.gateway.keys import Keys
from llmservices.gateway.llm import Inbox, MessageT
from llmservices.gateway.measures import Measures
from llmservices.gateway.server import HttpServer
from llmservices.gateway.sockets import bind, url

CONTEXT = 64
MODEL = "org/tiny"
EMBEDDER = "org/embedder"
CLASSIFIER = "org/classifier"
BODY_BYTES_MAX = 4096


def entry(name: str = MODEL) -> ModelEntry:
    """A model's row in the kernel's table."""
    return ModelEntry(name, "/models/tiny", b"d" * 16, "llama", CONTEXT, 100, 1, created_s=7)


def words(count: int, choice: int = 0) -> list[str]:
    """What the fake model says: a token a word, not all of them ASCII."""
    return [f" é{choice}{i}" if i % 2 else f" w{choice}{i}" for i in range(count)]


class FakeThread:
    """One generation: its rows from any offset on."""

    def __init__(self, generate: Generate, choice: int, prompt: list[str], tenant: int | None):
        self.stream = generate.key + bytes((choice,))
        self.tenant = tenant
        self.prompt = prompt
        asked = generate.output_tokens_max
        most = CONTEXT - len(prompt) if asked is None else asked
        said = words(most, choice)
        self.reason = "length"
        if generate.prompt == "stop":
            said, self.reason = said[: most // 2], "stop"
        self.error = ErrorKind.INTERNAL if generate.prompt == "broken" else None
        self.tokens = said
        self.wants = generate.sampling.logprobs
        self.wants_prompt = generate.sampling.prompt_logprobs and self.wants is not None
        self.cancelled = False
        self.ended = False
        """The end was acknowledged."""
        self.consumed = 0
        self.credit = asyncio.Event()

    def end(self) -> StreamEnd:
        """Its last row's."""
        if self.error is not None:
            return StreamEnd("error", len(self.tokens), len(self.prompt), None, self.error, "broke")
        return StreamEnd(self.reason, len(self.tokens), len(self.prompt))

    def rows(self, offset: int, scores: int) -> list[StreamRow]:
        """What follows; one row a token, the end with the last."""
        rows = []
        at = 0
        for number, token in enumerate(self.tokens):
            until = at + len(token.encode())
            if until > offset or (number >= scores and self.wants is not None):
                score = self._score(token, number, at)
                rows.append(
                    StreamRow(
                        self.stream,
                        token if until > offset else "",
                        until,
                        number + 1,
                        scores=[score] if self.wants is not None else None,
                    )
                )
            at = until
        last = rows.pop() if rows else StreamRow(self.stream, "", at, len(self.tokens))
        rows.append(
            StreamRow(last.stream, last.text, last.until, last.tokens, self.end(), last.scores)
        )
        if self.wants_prompt and offset == 0:
            rows[0] = StreamRow(
                rows[0].stream,
                rows[0].text,
                rows[0].until,
                rows[0].tokens,
                rows[0].end,
                rows[0].scores,
                self._prompt_scores(),
            )
        return rows

    def _score(self, token: str, number: int, at: int) -> TextScore:
        tops = (self.wants or 0) > 0
        return TextScore(
            token,
            number,
            -0.5 - number,
            [token, "x"][: self.wants],
            [number, 99][: self.wants],
            [-0.5 - number, -9.0][: self.wants] if tops else [],
            at,
        )

    def _prompt_scores(self) -> list[TextScore]:
        at = 0
        scores = []
        for number, token in enumerate(self.prompt):
            logprob = None if number == 0 else -1.0
            scores.append(TextScore(token, number, logprob, offset=at))
            at += len(token.encode())
        return scores


class FakeLlm:
    """Generates words, keeps streams, knows keys.  Messages are encoded as they would be."""

    def __init__(self) -> None:
        self.threads: dict[bytes, FakeThread] = {}
        self.generates: list[tuple[Generate, int | None]] = []
        self.encodes: list[tuple[Inputs, int | None]] = []
        self.models = [ModelRow(entry(), ModelState.IDLE, 0, 0, True)]
        self.deployed: list[DeploymentRow] = []
        self.status = Status(True, "1", 1, 1)
        self.down: set[type[Message]] = set()
        """What nobody answers."""
        self.refusal: RemoteError | None = None
        self.keys = {b"good": KeyPresented(5, "alice", False)}
        self.presented: list[bytes] = []
        self.hold = asyncio.Event()
        """Generation waits for it."""
        self.hold.set()
        self._feeding: dict[bytes, tuple[Inbox, asyncio.Task[None]]] = {}

    async def call(
        self,
        message: Message,
        answer: type[MessageT],
        *,
        target: str = "kernel",
        tenant: int | None = None,
        patience_ms: int,
    ) -> MessageT:
        """See Llm."""
        wire.encode_body(message)
        if type(message) in self.down:
            raise RemoteError(ErrorKind.UNAVAILABLE, f"{target} is down")
        found = self._answer(message)
        assert isinstance(found, answer)
        return found

    def _answer(self, message: Message) -> Message:
        match message:
            case ModelsAsk():
                return Models(self.models)
            case DeploymentsAsk():
                return Deployments(self.deployed)
            case ModelAsk(name=name):
                if name in (EMBEDDER, CLASSIFIER):
                    task = "embed" if name == EMBEDDER else "classify"
                    return ModelFound(msgspec.structs.replace(entry(), name=name, task=task))
                if name not in (None, MODEL):
                    raise invalid(f"there are {MODEL}")
                return ModelFound(entry())
            case StatusAsk():
                return self.status
            case ThreadCancel(forget=True):
                return Done()
            case MetricsAsk():
                return MetricsText("llmos_up 1\n")
            case TokenizeAsk(prompt=prompt):
                return Tokenized(list(range(len(_tokens(prompt or "chat")))), CONTEXT)
            case KeyPresent(key=key):
                self.presented.append(key)
                if key not in self.keys:
                    raise RemoteError(ErrorKind.DENIED, "this API key is not known")
                return self.keys[key]
            case _:
                raise AssertionError(message)

    async def encode(self, inputs: Inputs, *, tenant: int | None, patience_ms: int) -> list[Part]:
        """See Llm: of each input its length, its number, 0.5; two inputs a part."""
        self.encodes.append((inputs, tenant))
        if inputs.model not in (EMBEDDER, CLASSIFIER):
            raise invalid(f"no such model: {inputs.model}")
        given = inputs.texts if inputs.texts is not None else inputs.tokens or ()
        longest = max(map(len, given))
        if longest > CONTEXT and not inputs.truncate:
            raise invalid(f"an input has {longest} tokens, the model takes {CONTEXT}")
        parts: list[Part] = []
        for start in range(0, len(given), 2):
            some = given[start : start + 2]
            rows = [[float(len(each)), float(start + i), 0.5] for i, each in enumerate(some)]
            classes = inputs.task == "classify"
            answer = Encoded(
                inputs.model,
                3,
                [len(each) for each in some],
                labels=["long", "late", "half"] if classes else [],
                problem="single_label" if classes else "embedding",
            )
            parts.append(Part(answer, array.array("f", [number for row in rows for number in row])))
        return parts

    async def open(
        self, generate: Generate, inbox: Inbox, *, tenant: int | None, patience_ms: int
    ) -> Accepted:
        """See Llm."""
        assert wire.decode_body(0x0101, wire.encode_body(generate)) == generate
        if self.refusal is not None:
            raise self.refusal
        self.generates.append((generate, tenant))
        if generate.model not in (None, MODEL):
            raise invalid(f"no model {generate.model}")
        prompt = _prompt(generate)
        if not prompt:
            raise invalid("the prompt is empty")
        if len(prompt) + (generate.output_tokens_max or 0) > CONTEXT:
            raise invalid(f"{len(prompt)} tokens, the context has {CONTEXT}")
        for choice in range(generate.choices):
            thread = FakeThread(generate, choice, prompt, tenant)
            self.threads[thread.stream] = thread
            self._feed(thread, inbox, thread.rows(0, 0))
        return Accepted([b"t" * 8] * generate.choices, MODEL, len(prompt))

    async def resume(
        self,
        stream: bytes,
        inbox: Inbox,
        *,
        offset: int,
        scores: int,
        tenant: int | None,
        patience_ms: int,
    ) -> Attached:
        """See Llm."""
        thread = self.threads.get(stream)
        if thread is None or thread.ended or thread.cancelled:
            raise RemoteError(ErrorKind.STALE, f"stream {stream.hex()} is not known")
        if thread.tenant != tenant:
            raise RemoteError(ErrorKind.DENIED, "another tenant's")
        old = self._feeding.pop(stream, None)
        if old is not None:
            old[1].cancel()
            old[0].fail(RemoteError(ErrorKind.STALE, "read by another request"))
        self._feed(thread, inbox, thread.rows(offset, scores))
        return Attached(b"t" * 8, MODEL, 0)

    def consume(self, row: StreamRow, *, keep: bool) -> None:
        """See Llm."""
        thread = self.threads[row.stream]
        thread.consumed = row.tokens
        thread.credit.set()
        if row.end is not None:
            del self._feeding[row.stream]
            thread.ended = not keep

    def close(self, stream: bytes, inbox: Inbox, *, cancel: bool) -> None:
        """See Llm."""
        old = self._feeding.get(stream)
        if old is not None and old[0] is inbox:
            del self._feeding[stream]
            old[1].cancel()
            self.threads[stream].cancelled = cancel

    @property
    def reading(self) -> int:
        """Streams that somebody reads."""
        return len(self._feeding)

    def _feed(self, thread: FakeThread, inbox: Inbox, rows: list[StreamRow]) -> None:
        task = asyncio.create_task(self._rows(thread, inbox, rows))
        self._feeding[thread.stream] = (inbox, task)

    async def _rows(self, thread: FakeThread, inbox: Inbox, rows: list[StreamRow]) -> None:
        for row in rows:
            await self.hold.wait()
            while row.tokens - thread.consumed > limits.CREDIT_TOKENS:
                thread.credit.clear()
                await thread.credit.wait()
            inbox.put(row)
            await asyncio.sleep(0)


def _tokens(text: str) -> list[str]:
    """A token a character."""
    return list(text)


def _prompt(generate: Generate) -> list[str]:
    if generate.prompt_tokens is not None:
        return [chr(97 + token % 26) for token in generate.prompt_tokens]
    if generate.messages is not None:
        return _tokens("".join(message.content for message in generate.messages) + ":")
    return _tokens(generate.prompt or "")


class Gateway:
    """A real server, in this process."""

    def __init__(self, llm: FakeLlm, address: str, keys: Keys, measures: Measures) -> None:
        self.llm = llm
        self.address = address
        self.keys = keys
        self.measures = measures
        self.http = httpx.AsyncClient(base_url=address, timeout=20, verify=False)
        self._openai: openai.AsyncOpenAI | None = None

    @property
    def openai(self) -> openai.AsyncOpenAI:
        """The real client, made when it is first used: that takes a while."""
        if self._openai is None:
            self._openai = openai.AsyncOpenAI(
                base_url=f"{self.address}/v1", api_key="good", max_retries=0, timeout=20
            )
        return self._openai

    async def close(self) -> None:
        """Both clients."""
        await self.http.aclose()
        if self._openai is not None:
            await self._openai.close()


@contextlib.asynccontextmanager
async def serving(*, required: bool = False) -> AsyncIterator[Gateway]:
    """A gateway while it is needed."""
    llm = FakeLlm()
    keys = Keys(llm, required=required)
    measures = Measures()
    bound = bind("127.0.0.1", 0, shared_lock=None)
    app = application(llm, keys, measures, body_bytes_max=BODY_BYTES_MAX)
    server = HttpServer(app, bound)
    task = asyncio.create_task(server.run_here())
    gateway = Gateway(llm, url(bound), keys, measures)
    try:
        yield gateway
    finally:
        llm.hold.set()
        await gateway.close()
        server.stop()
        await task


@pytest_asyncio.fixture
async def gateway() -> AsyncIterator[Gateway]:
    """Open to everybody."""
    async with serving() as one:
        yield one


@pytest_asyncio.fixture
async def locked() -> AsyncIterator[Gateway]:
    """Asks for keys."""
    async with serving(required=True) as one:
        yield one
