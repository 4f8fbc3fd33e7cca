"""The description of the API, made of the structs that read and write it."""

from typing import Any, Final

import msgspec
from libllm.version import __version__
from llmproto.rights import ROUTE_RIGHTS

from llmservices.gateway.answers import (
    ChatChunk,
    ChatCompletion,
    ClassList,
    EmbeddingList,
    HealthBody,
    ModelList,
    ModelObject,
    StreamDeleted,
    TextCompletion,
)
from llmservices.gateway.bodies import ChatBody, ClassifyBody, CompletionBody, EmbeddingBody
from llmservices.gateway.errors import ErrorBody

JsonObject = dict[str, Any]  # Any: JSON

SUMMARIES: Final[dict[tuple[str, str], tuple[str, type | None, type | None]]] = {
    ("GET", "/health"): ("Can a request make progress?", None, HealthBody),
    ("GET", "/openapi.json"): ("This document", None, None),
    ("GET", "/metrics"): ("Prometheus text", None, None),
    ("GET", "/v1/models"): ("All models", None, ModelList),
    ("GET", "/v1/models/{model}"): ("One model", None, ModelObject),
    ("POST", "/v1/completions"): ("Continue a prompt", CompletionBody, TextCompletion),
    ("POST", "/v1/chat/completions"): ("Answer a chat", ChatBody, ChatCompletion),
    ("POST", "/v1/embeddings"): ("A vector for each input", EmbeddingBody, EmbeddingList),
    ("POST", "/v1/classify"): (
        "The labels of each input, by a classifier; numbers, by a regression",
        ClassifyBody,
        ClassList,
    ),
    ("GET", "/v1/streams/{stream}"): (
        "Go on with a stream behind `Last-Event-ID`; without that, from its beginning",
        None,
        None,
    ),
    ("DELETE", "/v1/streams/{stream}"): ("Cancel a stream", None, StreamDeleted),
}
"""Of each route: what it does, what it takes, what it gives."""


def document() -> bytes:
    """OpenAPI 3.1, as JSON."""
    kinds = [kind for _, *both in SUMMARIES.values() for kind in both if kind is not None]
    references, components = msgspec.json.schema_components(
        [*kinds, ChatChunk, ErrorBody], ref_template="#/components/schemas/{name}"
    )
    schemas = dict(zip([*kinds, ChatChunk, ErrorBody], references))
    paths: JsonObject = {}
    for (method, route), (summary, takes, gives) in SUMMARIES.items():
        operation: JsonObject = {
            "summary": summary,
            "responses": {
                "200": {"description": "Done", **_content(schemas, gives)},
                "default": {"description": "Failed", **_content(schemas, ErrorBody)},
            },
        }
        if takes is not None:
            operation["requestBody"] = {"required": True, **_content(schemas, takes)}
        names = [part[1:-1] for part in route.split("/") if part.startswith("{")]
        operation["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
            for name in names
        ]
        if ROUTE_RIGHTS[method, route] is not None:
            operation["security"] = [{"key": []}, {}]
        paths.setdefault(route, {})[method.lower()] = operation
    return msgspec.json.encode(
        {
            "openapi": "3.1.0",
            "info": {"title": "llmos", "version": __version__},
            "paths": paths,
            "components": {
                "schemas": components,
                "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
            },
        }
    )


def _content(schemas: dict[type, JsonObject], kind: type | None) -> JsonObject:
    if kind is None:
        return {}
    return {"content": {"application/json": {"schema": schemas[kind]}}}
