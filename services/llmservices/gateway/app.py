"""The routes: who may use them, what they take, what they answer.

Thin: bodies are read by `bodies`, translated by `core`, answered through `pieces` and `streaming`.
"""

import secrets
import time
from collections.abc import Callable
from typing import Final

import msgspec
from llmproto.base import Message
from llmproto.errors import ErrorKind, RemoteError
from llmproto.generation import Accepted, Generate, TokenizeAsk, Tokenized
from llmproto.metrics import MetricsAsk, MetricsText
from llmproto.models import (
    Deployments,
    DeploymentsAsk,
    ModelAsk,
    ModelFound,
    ModelRow,
    Models,
    ModelsAsk,
)
from llmproto.operation import Status, StatusAsk
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from llmservices.gateway import core, openapi
from llmservices.gateway.answers import HealthBody, ModelList, ModelObject, StreamDeleted
from llmservices.gateway.bodies import ChatBody, CompletionBody, decode
from llmservices.gateway.endpoint import Call, Endpoint, Handle, http_exception, read_body
from llmservices.gateway.errors import HttpError, model_not_found
from llmservices.gateway.health import Health
from llmservices.gateway.keys import Keys
from llmservices.gateway.llm import Llm, MessageT
from llmservices.gateway.measures import Measures
from llmservices.gateway.pieces import (
    Choice,
    Head,
    Piece,
    chat_completion,
    joined,
    text_completion,
    usage,
)
from llmservices.gateway.reading import Reading, unless_gone
from llmservices.gateway.sse import Mark, StreamName, completion_id, read_id, read_name
from llmservices.gateway.streaming import Events, EventStream, FinishedStream, Part
from llmservices.gateway.vectors import VectorRoutes

STREAMS_MAX: Final = 2048
"""Read at once by one worker: each buffers at most its credit."""
RESUMABLE_MAX: Final = 64
"""Choices of a request that can be resumed: their names stand in one header."""
PATIENCE_MS: Final = 5_000
HEALTH_PATIENCE_MS: Final = 1_000
METRICS_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"

Build = Callable[[bytes, bytes, int, bool], core.Wanted]
"""Body, key, seed and whether it is resumable, to what is wanted."""


def application(llm: Llm, keys: Keys, measures: Measures, *, body_bytes_max: int) -> Starlette:
    """All routes."""
    routes = Routes(llm, measures, body_bytes_max=body_bytes_max)
    vectors = VectorRoutes(llm, measures, body_bytes_max=body_bytes_max)
    table: list[tuple[str, str, Handle]] = [
        ("GET", "/health", routes.health),
        ("GET", "/metrics", routes.metrics),
        ("GET", "/openapi.json", routes.openapi),
        ("GET", "/v1/models", routes.models),
        ("GET", "/v1/models/{model:path}", routes.model),
        ("POST", "/v1/completions", routes.completions),
        ("POST", "/v1/chat/completions", routes.chat),
        ("POST", "/v1/embeddings", vectors.embeddings),
        ("POST", "/v1/classify", vectors.classify),
        ("GET", "/v1/streams/{stream}", routes.resume),
        ("DELETE", "/v1/streams/{stream}", routes.cancel),
    ]
    by_path: dict[str, dict[str, Handle]] = {}
    for method, path, handle in table:
        by_path.setdefault(path, {})[method] = handle
    made = Starlette(
        routes=[
            Route(path, Endpoint(path, handles, keys, measures), methods=list(handles))
            for path, handles in by_path.items()
        ],
        exception_handlers={404: http_exception, 405: http_exception},
    )
    made.router.redirect_slashes = False
    return made


class Routes:
    """What every route does."""

    def __init__(self, llm: Llm, measures: Measures, *, body_bytes_max: int) -> None:
        self._llm = llm
        self._measures = measures
        self._body_bytes_max = body_bytes_max
        self._health = Health()
        self._document = openapi.document()

    # --- looking ----------------------------------------------------------------------------------

    async def health(self, request: Request, call: Call) -> Response:
        """200 while a request can make progress."""
        try:
            status = await self._llm.call(StatusAsk(), Status, patience_ms=HEALTH_PATIENCE_MS)
            models = await self._llm.call(ModelsAsk(), Models, patience_ms=HEALTH_PATIENCE_MS)
        except RemoteError as error:
            reasons = [f"the kernel does not answer: {error.detail}"]
        else:
            reasons = self._health.reasons(time.monotonic_ns(), status, models)
        if reasons:
            return _json(HealthBody("unavailable", reasons), status=503)
        return _json(HealthBody("ok"))

    async def metrics(self, request: Request, call: Call) -> Response:
        """From the monitor."""
        found = await self._llm.call(
            MetricsAsk(), MetricsText, target="monitor", patience_ms=PATIENCE_MS
        )
        return Response(found.text, media_type=METRICS_TYPE)

    async def openapi(self, request: Request, call: Call) -> Response:
        """This API."""
        return Response(self._document, media_type="application/json")

    async def models(self, request: Request, call: Call) -> Response:
        """All models."""
        return _json(ModelList([_model(row) for row in await self._model_rows()]))

    async def model(self, request: Request, call: Call) -> Response:
        """One model; its name may hold slashes."""
        name: str = request.path_params["model"]
        for row in await self._model_rows():
            if row.model.name == name:
                return _json(_model(row))
        raise model_not_found(name, "there is no such model")

    # --- generating -------------------------------------------------------------------------------

    async def completions(self, request: Request, call: Call) -> Response:
        """Continue a prompt."""

        def build(body: bytes, key: bytes, seed: int, resumable: bool) -> core.Wanted:
            read = decode(body, CompletionBody)
            return core.completion(read, key=key, seed=seed, resumable=resumable)

        return await self._generate(request, call, build)

    async def chat(self, request: Request, call: Call) -> Response:
        """Answer a chat."""

        def build(body: bytes, key: bytes, seed: int, resumable: bool) -> core.Wanted:
            read = decode(body, ChatBody)
            return core.chat(read, key=key, seed=seed, resumable=resumable)

        return await self._generate(request, call, build)

    async def resume(self, request: Request, call: Call) -> Response:
        """Go on with a stream behind the event that the client had last."""
        name = read_name(request.path_params["stream"])
        last = request.headers.get("last-event-id")
        mark = None
        if last:
            found, mark = read_id(last)
            if found.stream != name.stream:
                raise HttpError(
                    400,
                    f"Last-Event-ID is of stream {found.stream.hex()}, not of {name.stream.hex()}",
                    param="Last-Event-ID",
                )
            name = found
        if mark is not None and (mark.stage == "u" or (mark.stage == "f" and not name.usage)):
            return FinishedStream()
        self._check_room(1)
        reading = self._reading(call, resumable=True)
        at = mark if mark is not None else Mark()
        try:
            attached = await unless_gone(
                request.receive,
                reading.resume(name.stream, offset=at.offset, scores=at.scores),
            )
        except BaseException:
            reading.close(cancel=False)
            raise
        head = Head(name.completion, name.created_s, attached.model)
        choice = Choice(
            name.index, shows_logprobs=name.scored, offset=at.offset, characters=at.characters
        )
        events = Events(head, [Part(name, choice, mark)], with_ids=True, prompt_tokens=None)
        return EventStream(reading, events, names=[name])

    async def cancel(self, request: Request, call: Call) -> Response:
        """End a stream, whoever reads it; it is forgotten once this is answered."""
        name = read_name(request.path_params["stream"])
        reading = self._reading(call, resumable=True)
        try:
            await reading.forget(name.stream)
        finally:
            reading.close(cancel=True)
        return _json(StreamDeleted(str(name)))

    async def _generate(self, request: Request, call: Call, build: Build) -> Response:
        body = await read_body(request, self._body_bytes_max)
        resumable = request.headers.get("llmos-resumable", "").lower() == "true"
        key, seed = secrets.token_bytes(16), secrets.randbits(53)
        wanted = build(body, key, seed, resumable)
        if resumable and wanted.total > RESUMABLE_MAX:
            raise HttpError(
                400, f"{wanted.total} choices; at most {RESUMABLE_MAX} can be resumed", param="n"
            )
        self._check_room(wanted.total)
        reading = self._reading(call, resumable=resumable)
        try:
            accepted = await unless_gone(request.receive, self._open(reading, wanted, call))
            names = wanted.names(int(time.time()))
            head = Head(
                completion_id(wanted.key, chat=wanted.chat),
                names[0].created_s,
                accepted[0].model,
            )
            prompt_tokens = sum(each.prompt_tokens for each in accepted)
            parts = [Part(name, _choice(wanted, name)) for name in names]
            if wanted.stream:
                events = Events(head, parts, with_ids=resumable, prompt_tokens=prompt_tokens)
                return EventStream(reading, events, names=names)
            pieces = await unless_gone(request.receive, _all(reading, parts))
        except BaseException:
            reading.close(cancel=True)
            raise
        told = usage((piece.end for piece in pieces if piece.end is not None), prompt_tokens)
        make = chat_completion if wanted.chat else text_completion
        return _json(make(head, pieces, told, shows_logprobs=wanted.shows_logprobs))

    async def _open(self, reading: Reading, wanted: core.Wanted, call: Call) -> list[Accepted]:
        try:
            return await reading.open(wanted)
        except RemoteError as error:
            if error.kind is ErrorKind.INVALID:
                for generate in wanted.generates:
                    await self._diagnose(generate, error, call.caller.tenant)
            raise

    async def _diagnose(self, generate: Generate, error: RemoteError, tenant: int | None) -> None:
        """Why it is INVALID, in the codes that clients of OpenAI know; asks again what was refused,
        as details are only for people."""
        found = await self._try(ModelAsk(generate.model), ModelFound, tenant)
        if found is None:
            if generate.model is not None:
                raise model_not_found(generate.model, error.detail)
            return
        tokens = len(generate.prompt_tokens or ())
        if generate.prompt_tokens is None:
            ask = TokenizeAsk(generate.model, generate.prompt, generate.messages)
            tokenized = await self._try(ask, Tokenized, tenant, target="tokenizer")
            tokens = 0 if tokenized is None else len(tokenized.tokens)
        if tokens + (generate.output_tokens_max or 0) > found.model.context_tokens:
            raise HttpError(
                400,
                error.detail,
                param="prompt" if generate.messages is None else "messages",
                code="context_length_exceeded",
            )

    async def _try(
        self,
        message: Message,
        answer: type[MessageT],
        tenant: int | None,
        *,
        target: str = "kernel",
    ) -> MessageT | None:
        """The answer; None where that is INVALID."""
        try:
            return await self._llm.call(
                message, answer, target=target, tenant=tenant, patience_ms=PATIENCE_MS
            )
        except RemoteError as error:
            if error.kind is ErrorKind.INVALID:
                return None
            raise

    def _reading(self, call: Call, *, resumable: bool) -> Reading:
        return Reading(self._llm, self._measures, tenant=call.caller.tenant, resumable=resumable)

    def _check_room(self, streams: int) -> None:
        if self._measures.streams + streams > STREAMS_MAX:
            raise HttpError(
                429,
                f"{self._measures.streams} streams are read by this gateway and {streams} more are "
                f"asked for; {STREAMS_MAX} is the most",
                code="too_many_streams",
                retry_after_ms=1_000,
            )

    async def _model_rows(self) -> list[ModelRow]:
        """Names that serve, then entries."""
        rows = (await self._llm.call(ModelsAsk(), Models, patience_ms=PATIENCE_MS)).rows
        named = {row.model.name: row for row in rows}
        asked = await self._llm.call(DeploymentsAsk(), Deployments, patience_ms=PATIENCE_MS)
        served = [
            msgspec.structs.replace(
                row, model=msgspec.structs.replace(row.model, name=deployment.name)
            )
            for deployment in asked.rows
            if (row := named.get(deployment.serving or "")) is not None
        ]
        return [*served, *rows]


async def _all(reading: Reading, parts: list[Part]) -> list[Piece]:
    """Every choice, to its end."""
    by_stream = {part.name.stream: part for part in parts}
    pieces: dict[bytes, list[Piece]] = {stream: [] for stream in by_stream}
    while not reading.is_over:
        for row in await reading.take():
            pieces[row.stream].append(by_stream[row.stream].choice.take(row))
            reading.consume(row)
    return [joined(each) for each in pieces.values()]


def _choice(wanted: core.Wanted, name: StreamName) -> Choice:
    prompt = wanted.generates[name.prompt].prompt
    return Choice(
        name.index,
        echo=prompt if wanted.echo else None,
        echoes_scores=wanted.echo,
        shows_logprobs=wanted.shows_logprobs,
    )


def _called(row: ModelRow, name: str) -> ModelRow:
    return msgspec.structs.replace(row, model=msgspec.structs.replace(row.model, name=name))


def _model(row: ModelRow) -> ModelObject:
    entry = row.model
    return ModelObject(
        id=entry.name,
        created=entry.created_s,
        context_tokens=entry.context_tokens,
        chat=entry.chat,
        state=row.state.value,
        default=row.default,
        task=entry.task,
    )


def _json(value: msgspec.Struct, *, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, media_type="application/json")
