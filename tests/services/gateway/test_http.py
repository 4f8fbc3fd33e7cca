"""Bad input, and the routes beside generation, over raw HTTP: errors always have OpenAI's form."""

import asyncio
import json
from typing import Any

import msgspec
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from llmproto.metrics import MetricsAsk
from llmproto.models import ModelRow, ModelState
from llmproto.operation import Status, StatusAsk
from llmproto.rights import ROUTE_RIGHTS

from .conftest import BODY_BYTES_MAX, MODEL, Gateway, entry, serving

JSON = {"content-type": "application/json"}
CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
HELLO = [{"role": "user", "content": "hi"}]


async def refused(gateway: Gateway, path: str, body: Any, status: int = 400) -> dict[str, Any]:
    """The error of a body, which may be anything."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = await gateway.http.post(path, content=content, headers=JSON)
    assert answer.status_code == status, answer.text
    error: dict[str, Any] = answer.json()["error"]
    assert error["message"] and set(error) == {"message", "type", "param", "code"}
    return error


async def test_bad_bodies(gateway: Gateway) -> None:
    error = await refused(gateway, TEXT, {"prompt": "a", "top_p": 2})
    assert (error["param"], error["type"]) == ("top_p", "invalid_request_error")
    assert (await refused(gateway, CHAT, {"messages": HELLO, "tools": [1]}))["param"] == "tools"
    assert (await refused(gateway, TEXT, b'{"prompt": nope}'))["code"] == "invalid_json"
    assert not gateway.llm.generates


async def test_what_asks_for_nothing_is_taken(gateway: Gateway) -> None:
    body = {
        "messages": HELLO,
        "model": None,
        "tools": [],
        "tool_choice": None,
        "response_format": {"type": "text"},
        "modalities": ["text"],
        "stop": None,
        "n": None,
        "temperature": None,
        "store": False,
        "service_tier": "auto",
        "stream": False,
        "max_tokens": 1,
    }
    answer = await gateway.http.post(CHAT, json=body)
    assert answer.status_code == 200, answer.text


async def test_oversized_bodies(gateway: Gateway) -> None:
    body = {"prompt": "a" * BODY_BYTES_MAX}
    error = await refused(gateway, TEXT, body, 413)
    assert str(BODY_BYTES_MAX) in error["message"]
    assert str(len(json.dumps(body))) in error["message"]

    async def parts() -> Any:
        for _ in range(64):
            yield b" " * 1024

    answer = await gateway.http.post(TEXT, content=parts(), headers=JSON)
    assert answer.status_code == 413


async def test_wrong_content_type(gateway: Gateway) -> None:
    for headers in ({}, {"content-type": "text/plain"}, {"content-type": "multipart/form-data"}):
        answer = await gateway.http.post(TEXT, content=b"{}", headers=headers)
        assert answer.status_code == 415
        assert "application/json" in answer.json()["error"]["message"]


async def test_wrong_methods_and_paths(gateway: Gateway) -> None:
    answer = await gateway.http.get(TEXT)
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")
    assert "POST" in answer.json()["error"]["message"]
    for path in ("/", "/v1", "/v1/engines", "/v1/models/"):
        missing = await gateway.http.get(path)
        assert missing.status_code == 404, path
        assert missing.json()["error"]["message"]


NO_HTTP = [
    b"nonsense\r\n\r\n",
    b"GET / HTTP/1.1\r\nbad header\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\ncontent-length: x\r\n\r\n",
    b"GET /" + b"a" * 70_000,
    b"GET / HTTP/1.1\r\nx: " + b"a" * 70_000,
]


async def test_what_is_no_http(gateway: Gateway) -> None:
    host, port = gateway.address.removeprefix("http://").split(":")
    for data in NO_HTTP:
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(data)
        answer = await reader.read()
        writer.close()
        head, _, body = answer.partition(b"\r\n\r\n")
        assert head.split(b" ")[1] in (b"400", b"431")
        assert json.loads(body)["error"]["message"]
        assert b"Traceback" not in answer


async def test_health(gateway: Gateway) -> None:
    assert (await gateway.http.get("/health")).json() == {"status": "ok", "reasons": []}
    gateway.llm.models = [ModelRow(entry(), ModelState.FAILED, 0, 0, True, detail="no memory")]
    gateway.llm.status = Status(False, "1", 1, 1, not_ready=["tokenizer: starting", "monitor: x"])
    answer = await gateway.http.get("/health")
    assert answer.status_code == 503
    assert answer.json()["reasons"] == [
        "tokenizer: starting",
        "no model can be loaded (org/tiny: no memory)",
    ]
    gateway.llm.down.add(StatusAsk)
    answer = await gateway.http.get("/health")
    assert answer.status_code == 503
    assert "kernel" in answer.json()["reasons"][0]


async def test_metrics(gateway: Gateway) -> None:
    answer = await gateway.http.get("/metrics")
    assert (answer.status_code, answer.text) == (200, "llmos_up 1\n")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    gateway.llm.down.add(MetricsAsk)
    down = await gateway.http.get("/metrics")
    assert down.status_code == 503
    assert down.json()["error"]["code"] == "unavailable"
    assert down.headers["retry-after"] == "1"


async def test_openapi(gateway: Gateway) -> None:
    found = (await gateway.http.get("/openapi.json")).json()
    described = {
        (method.upper(), path) for path, methods in found["paths"].items() for method in methods
    }
    assert described == set(ROUTE_RIGHTS)
    schemas = found["components"]["schemas"]
    assert schemas["CompletionBody"]["properties"]["max_tokens"]["default"] == 16
    text = json.dumps(found)
    for name in {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}:
        assert name in schemas


async def test_keys_guard_every_route_that_asks_for_one(locked: Gateway) -> None:
    for method, path in ROUTE_RIGHTS:
        answer = await locked.http.request(method, path.replace("{", "").replace("}", ""))
        if ROUTE_RIGHTS[method, path] is None:
            assert answer.status_code == 200
        else:
            assert answer.status_code == 401
            assert answer.headers["www-authenticate"] == "Bearer"


async def test_requests_are_measured(gateway: Gateway) -> None:
    await gateway.http.post(TEXT, json={"prompt": "abc", "max_tokens": 4})
    await refused(gateway, TEXT, {})
    report = gateway.measures.report("gateway", 1)
    counts = {
        (sample.name, sample.labels.get("status")): sample.value for sample in report.counters
    }
    assert counts["llmos_gateway_requests_total", "200"] == 1
    assert counts["llmos_gateway_requests_total", "400"] == 1
    assert counts["llmos_gateway_prompt_tokens_total", None] == 3
    assert counts["llmos_gateway_output_tokens_total", None] == 4
    histograms = {each.name: sum(each.counts) for each in report.histograms}
    assert histograms["llmos_gateway_first_token_seconds"] == 1
    assert histograms["llmos_gateway_between_tokens_seconds"] == 3
    assert report.gauges[0].value == 0
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(report), type=type(report)) == report


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["role", "content", "type", "text", "include_usage", "1"]) | st.text(),
            inner,
            max_size=4,
        )
    ),
    max_leaves=8,
)
FIELDS = [
    *("prompt", "messages", "model", "max_tokens", "temperature", "top_p", "n", "stop", "seed"),
    *("logprobs", "echo", "stream", "stream_options", "logit_bias", "top_k", "tools", "best_of"),
    *("response_format", "suffix", "top_logprobs", "max_completion_tokens", "user", "other"),
]
GOOD = {"prompt": "ab", "messages": HELLO, "model": MODEL, "max_tokens": 2, "n": 2, "echo": True}


async def test_no_body_breaks_it() -> None:
    """Whatever is sent: an answer, or a refusal; never the gateway's own failure."""
    bodies: list[tuple[str, bytes]] = []

    @settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
    @given(
        st.sampled_from([TEXT, CHAT]),
        st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=5),
        st.sets(st.sampled_from(sorted(GOOD))),
        st.booleans(),
    )
    def collect(path: str, wild: dict[str, Any], good: set[str], raw: bool) -> None:
        keep = {"prompt"} if path == TEXT else {"messages"}
        body = {name: GOOD[name] for name in good | keep if name in keep | {"model", "n"}} | wild
        data = json.dumps(body).encode(errors="surrogatepass")
        bodies.append((path, data[: len(data) // 2] if raw else data))

    collect()
    async with serving() as gateway:
        for path, body in bodies:
            answer = await gateway.http.post(path, content=body, headers=JSON)
            assert answer.status_code < 500, (body, answer.text)
            if answer.status_code >= 400:
                assert answer.json()["error"]["message"]
        assert gateway.llm.reading == 0
        assert gateway.measures.streams == 0
