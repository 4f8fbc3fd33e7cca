"""HTTP as its users know it: the unmodified openai package and plain requests, over real
processes."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from libllm.client import AsyncClient

import libllm

from .conftest import SERVED, Boot, System, run_llmos

MODEL = "llmos-mini"
PROMPT = "The for statement"


def url_of(system: System) -> str:
    """The gateway's address."""
    with libllm.connect(system.home.root) as llm:
        return llm.status().http


@pytest.fixture(scope="module")
def url(served: System) -> str:
    return url_of(served)


@pytest.fixture
def http(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=60) as client:
        yield client


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as made:
        yield made


def test_the_same_text_everywhere(served: System, client: openai.OpenAI) -> None:
    """Prompt and seed decide: through the command line, HTTP and the library."""
    for temperature in (0.0, 0.8):
        completion = client.completions.create(
            model=MODEL, prompt=PROMPT, max_tokens=40, temperature=temperature, seed=11
        )
        with libllm.connect(served.home.root) as llm:
            ours = llm.generate(PROMPT, max_tokens=40, temperature=temperature, seed=11)
        options = ["--max-tokens", "40", "--temperature", str(temperature), "--seed", "11"]
        done = run_llmos("run", MODEL, PROMPT, *options, home=served.home.root)
        assert completion.choices[0].text == ours.text == done.stdout
        assert completion.usage is not None
        assert completion.usage.completion_tokens == ours.usage.output_tokens


def test_models(client: openai.OpenAI) -> None:
    assert [row.id for row in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "llmos"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nothing")


def test_choices_stops_and_scores(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": MODEL, "prompt": PROMPT, "seed": 3, "max_tokens": 24}
    several = client.completions.create(n=3, **asked)
    assert len({choice.text for choice in several.choices}) == 3
    greedy = client.completions.create(temperature=0, logprobs=2, echo=True, **asked)
    choice = greedy.choices[0]
    assert choice.text.startswith(PROMPT) and choice.logprobs is not None
    assert "".join(choice.logprobs.tokens or []).removeprefix("<|bos|>") == choice.text
    scores = choice.logprobs.token_logprobs or []
    assert all(score is None or score <= 0 for score in scores)
    word = choice.text.removeprefix(PROMPT).split()[2]
    stopped = client.completions.create(temperature=0, stop=[word], **asked)
    assert stopped.choices[0].finish_reason == "stop"
    assert word not in stopped.choices[0].text


def test_streams(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": MODEL, "prompt": PROMPT, "seed": 3, "max_tokens": 24}
    whole = client.completions.create(**asked)
    with client.completions.create(stream=True, **asked) as stream:
        chunks = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason


def test_chat(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "What is a list?"}],
        "seed": 5,
        "max_tokens": 30,
    }
    whole = client.chat.completions.create(**asked)
    assert whole.choices[0].message.role == "assistant"
    stream = client.chat.completions.create(
        stream=True, stream_options={"include_usage": True}, **asked
    )
    chunks = list(stream)
    texts = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(texts) == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage


def test_refusals_are_the_exceptions_of_openai(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": MODEL, "prompt": PROMPT}
    with pytest.raises(openai.BadRequestError, match=r"6001.*1024") as caught:
        client.completions.create(model=MODEL, prompt="word " * 3000)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="nothing", prompt=PROMPT)
    assert missing.value.code == "model_not_found"
    for wrong in ({"temperature": -1}, {"n": 1000}, {"stop": ["x"] * 100}, {"max_tokens": -1}):
        with pytest.raises(openai.BadRequestError) as refused:
            client.completions.create(**asked, **wrong)
        assert refused.value.param == next(iter(wrong))


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        (b"{bad", 400, "JSON"),
        (b"", 400, "JSON"),
        (b"[]", 400, "object"),
        (b'"x"', 400, "object"),
        (b"\xff\xfe", 400, "JSON"),
        (b"[" * 100_000, 400, ""),
        (b'{"prompt": ' + b"[" * 100_000, 400, ""),
        (b'{"prompt": 5}', 400, "prompt"),
        (b'{"prompt": "x", "temperature": NaN}', 400, "JSON"),
        (b'{"prompt": "x", "temperature": 1e999}', 400, "temperature"),
        (b'{"prompt": "x", "temperature": "hot"}', 400, "temperature"),
        (b'{"prompt": "x", "top_p": 7}', 400, "top_p"),
        (b'{"prompt": "x", "n": 0}', 400, "n"),
        (b'{"prompt": "x", "max_tokens": 1e12}', 400, "max_tokens"),
        (b'{"prompt": "x", "max_tokens": 5000}', 400, "5002"),
        (b'{"prompt": "x", "logit_bias": {"5": 1000}}', 400, "logit_bias"),
        (b'{"prompt": "x", "logit_bias": {"five": 1}}', 400, "five"),
        (b'{"prompt": "x", "logit_bias": {"999999": 1}}', 400, "2048"),
        (b'{"prompt": []}', 400, "empty"),
        (b'{"prompt": [99999999999]}', 400, "prompt"),
        (b'{"prompt": [5000]}', 400, "2048"),
        (b'{"prompt": "x", "colour": "red"}', 400, "colour"),
        (b'{"prompt": "x", "best_of": 5}', 400, "best_of"),
        (b'{"prompt": "x", "tools": [1]}', 400, "tools"),
        (b'{"prompt": "x", "model": "nothing"}', 404, "nothing"),
        (b'{"model": "llmos-mini"}', 400, "prompt"),
        (b"x" * (2 << 20), 413, "1048576"),
    ],
)
def test_wrong_bodies(http: httpx.Client, body: bytes, status: int, says: str) -> None:
    """Each gives the status and the body of an OpenAI error."""
    headers = {"content-type": "application/json"}
    answer = http.post("/v1/completions", content=body, headers=headers)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert says in error["message"], error
    assert "Traceback" not in answer.text


def test_wrong_ways(http: httpx.Client) -> None:
    body = json.dumps({"prompt": "x"}).encode()
    plain = http.post("/v1/completions", content=body, headers={"content-type": "text/plain"})
    assert plain.status_code == 415
    assert http.get("/v1/completions").status_code == 405
    assert http.get("/nothing").status_code == 404
    assert http.get("/v1/streams/nothing").status_code in (400, 404)
    for path in ("/health", "/metrics", "/openapi.json"):
        assert http.get(path).status_code == 200
    assert http.get("/health").json()["status"] == "ok"
    assert "/v1/completions" in http.get("/openapi.json").json()["paths"]
    assert "llmos_" in http.get("/metrics").text


def test_keys(booted: Boot) -> None:
    """Required, added, used, removed; and nobody reads another's stream."""
    asyncio.run(keys_are_used(booted(SERVED + "keys_required = true\n")))


async def keys_are_used(system: System) -> None:
    async with system.client() as operator:
        await keys_of(operator, (await operator.status()).http)


async def keys_of(operator: AsyncClient, url: str) -> None:
    ours, theirs = await operator.add_key("ours"), await operator.add_key("theirs")
    async with httpx.AsyncClient(base_url=url, timeout=60) as http:

        async def get(path: str, key: str | None) -> int:
            headers = {} if key is None else {"authorization": f"Bearer {key}"}
            return (await http.get(path, headers=headers)).status_code

        assert await get("/health", None) == 200
        for key in (None, "wrong", "llmos-" + "0" * 64, "x" * 5000):
            assert await get("/v1/models", key) == 401, key
            assert await get("/metrics", key) == 401
        assert await get("/v1/models", ours) == await get("/v1/models", theirs) == 200

        body = {"prompt": PROMPT, "max_tokens": 900, "ignore_eos": True, "stream": True}
        headers = {"authorization": f"Bearer {ours}", "llmos-resumable": "true"}
        async with http.stream("POST", "/v1/completions", json=body, headers=headers) as stream:
            assert stream.status_code == 200
            names = [value for name, value in stream.headers.items() if "stream" in name.lower()]
            name = names[0].split(",")[0].strip()
            for wrong, status in ((theirs, {403, 404}), ("wrong", {401}), (None, {401})):
                assert await get(f"/v1/streams/{name}", wrong) in status, (wrong, name)
        mine = {"authorization": f"Bearer {ours}"}
        assert (await http.delete(f"/v1/streams/{name}", headers=mine)).status_code == 200
    with pytest.raises(libllm.RemoteError):
        await operator.add_key("ours")
    await operator.remove_key("ours")
    assert [row.name for row in await operator.keys()] == ["theirs"]
    with pytest.raises(libllm.RemoteError):
        await operator.remove_key("ours")
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=theirs) as client:
        assert [row.id async for row in client.models.list()] == [MODEL]
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:
        with pytest.raises(openai.AuthenticationError):
            await client.models.list()
