"""The routes of encoders: /v1/embeddings as OpenAI's API has it, /v1/classify beside it.

Source: OpenAI API reference (platform.openai.com/docs/api-reference/embeddings).
"""

import array
import base64
import sys
from typing import Final

import msgspec
from libllm.vectors import (
    Embeddings,
    Inputs,
    Part,
    classifications,
    embeddings,
    inputs_of,
)
from llmproto.errors import ErrorKind, RemoteError
from llmproto.generation import TokenizeAsk, Tokenized
from llmproto.models import ModelAsk, ModelFound
from starlette.requests import Request
from starlette.responses import Response

from llmservices.gateway.answers import (
    ClassList,
    ClassRow,
    EmbeddingList,
    EmbeddingRow,
    InputUsage,
)
from llmservices.gateway.bodies import ClassifyBody, EmbeddingBody, decode
from llmservices.gateway.endpoint import Call, read_body
from llmservices.gateway.errors import HttpError, invalid_field, model_not_found
from llmservices.gateway.llm import Llm
from llmservices.gateway.measures import Measures
from llmservices.gateway.reading import ACCEPT_MS, unless_gone

ANSWER_MS: Final = 600_000
"""How long a request may wait for its vectors: behind everybody else's, on a slow device."""


class VectorRoutes:
    """Both routes."""

    def __init__(self, llm: Llm, measures: Measures, *, body_bytes_max: int) -> None:
        self._llm = llm
        self._measures = measures
        self._body_bytes_max = body_bytes_max

    async def embeddings(self, request: Request, call: Call) -> Response:
        """A vector for each input."""
        body = decode(await read_body(request, self._body_bytes_max), EmbeddingBody)
        texts, tokens = _inputs(body.input)
        inputs = Inputs(texts=texts, tokens=tokens, model=body.model, truncate=bool(body.truncate))
        parts = await self._encode(request, call, inputs)
        try:
            found = embeddings(parts, dimensions=body.dimensions)
        except RemoteError as error:
            raise invalid_field(error.detail, "dimensions") from None
        rows = [
            EmbeddingRow(number, _shown(found, number, body.encoding_format or "float"))
            for number in range(len(found))
        ]
        usage = InputUsage(found.tokens, found.tokens)
        return _json(EmbeddingList(rows, found.model, usage))

    async def classify(self, request: Request, call: Call) -> Response:
        """Scores of every label, for each input."""
        body = decode(await read_body(request, self._body_bytes_max), ClassifyBody)
        texts, _ = _inputs(body.input)
        assert texts is not None
        pairs = [body.pairs] if isinstance(body.pairs, str) else body.pairs
        if pairs is not None and len(pairs) != len(texts):
            raise invalid_field(
                f"{len(texts)} inputs and {len(pairs)} pairs: send one for each", "pairs"
            )
        inputs = Inputs(
            texts=texts,
            pairs=pairs,
            model=body.model,
            task="classify",
            truncate=bool(body.truncate),
        )
        parts = await self._encode(request, call, inputs)
        answer = parts[0].answer
        rows = [
            ClassRow(number, found.label, list(found.scores.values()), len(answer.labels))
            for number, found in enumerate(classifications(parts))
        ]
        tokens = sum(sum(part.answer.tokens) for part in parts)
        usage = InputUsage(tokens, tokens)
        return _json(ClassList(rows, answer.model, answer.labels, answer.problem, usage))

    async def _encode(self, request: Request, call: Call, inputs: Inputs) -> list[Part]:
        tenant = call.caller.tenant
        try:
            parts = await unless_gone(
                request.receive, self._llm.encode(inputs, tenant=tenant, patience_ms=ANSWER_MS)
            )
        except RemoteError as error:
            if error.kind is ErrorKind.INVALID:
                await self._diagnose(inputs, error, tenant)
            raise
        self._measures.prompt_tokens += sum(sum(part.answer.tokens) for part in parts)
        return parts

    async def _diagnose(self, inputs: Inputs, error: RemoteError, tenant: int | None) -> None:
        """Why it is INVALID, in the codes that clients of OpenAI know; asks again what was refused,
        as details are only for people."""
        try:
            model = await self._llm.call(
                ModelAsk(inputs.model), ModelFound, tenant=tenant, patience_ms=ACCEPT_MS
            )
        except RemoteError as other:
            if other.kind is ErrorKind.INVALID and inputs.model is not None:
                raise model_not_found(inputs.model, error.detail) from None
            return
        if model.model.task == "generate" or inputs.truncate:
            return
        longest = max(map(len, inputs.tokens or ()), default=0)
        if inputs.texts is not None and inputs.pairs is None:
            ask = TokenizeAsk(inputs.model, max(inputs.texts, key=len))
            tokenized = await self._llm.call(
                ask, Tokenized, target="tokenizer", tenant=tenant, patience_ms=ACCEPT_MS
            )
            longest = len(tokenized.tokens)
        if longest > model.model.context_tokens:
            raise HttpError(400, error.detail, param="input", code="context_length_exceeded")


def _inputs(
    given: "str | list[str] | list[int] | list[list[int]] | list[str | int | list[int]]",
) -> tuple[list[str] | None, list[list[int]] | None]:
    """(texts, tokens), none of them empty: HttpError(400)."""
    try:
        texts, tokens = inputs_of(given)  # type: ignore[arg-type]  # every mixture is looked into
    except RemoteError as error:
        raise invalid_field(error.detail, "input") from None
    empty = [number for number, each in enumerate(texts or tokens or ()) if not each]
    if empty:
        raise invalid_field(f"input {empty[0]} is empty: send at least one character", "input")
    return texts, tokens


def _shown(found: Embeddings, number: int, form: str) -> list[float] | str:
    """As numbers, or as the base64 text of little-endian float32."""
    vector = found[number]
    if form == "float":
        return vector.tolist()
    if sys.byteorder == "big":
        vector = array.array("f", vector)
        vector.byteswap()
    return base64.b64encode(vector.tobytes()).decode()


def _json(value: msgspec.Struct) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")
