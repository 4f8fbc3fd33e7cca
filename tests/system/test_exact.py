"""End to end, token for token: what the reference implementation writes comes out of the whole
system, whoever runs beside it and however the prompt is computed."""

import asyncio
import json
import subprocess
import sys

import httpx
import msgspec
import pytest
from libllm.client import AsyncClient
from libllm.results import Completion

from .conftest import ROOT, Boot, System
from .load import Ask, complete, load, read

FOLDER = ROOT.parent / "shared/assets/models/stories260k-llama"
PROMPT = "Once upon a time"
TOKENS = 200
CHUNKED = '[executor]\nmode = "exact"\nstep_tokens = 3\n[gateway]\nport = 0\n'

pytestmark = pytest.mark.skipif(not FOLDER.exists(), reason="needs the stories260k model")


class Reference(msgspec.Struct, frozen=True):
    """What transformers writes in float32."""

    prompt: list[int]
    output: list[int]
    text: str


REFERENCE = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
torch.set_num_threads(1)
folder, prompt, tokens = sys.argv[1], sys.argv[2], int(sys.argv[3])
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
ids = tokenizer(prompt, return_tensors="pt").input_ids
found = model.generate(ids, max_new_tokens=tokens, do_sample=False)[0].tolist()
text = tokenizer.decode(found, skip_special_tokens=True)
print(json.dumps({"prompt": ids[0].tolist(), "output": found[ids.shape[1]:], "text": text}))
"""
"""In a process of its own, so that its memory and its threads are gone when the system boots."""


@pytest.fixture(scope="module")
def reference() -> Reference:
    pytest.importorskip("transformers")
    found = subprocess.run(
        [sys.executable, "-c", REFERENCE, str(FOLDER), PROMPT, str(TOKENS)],
        capture_output=True,
        check=True,
    )
    return msgspec.json.decode(found.stdout.splitlines()[-1], type=Reference)


async def ids(client: AsyncClient, model: str, prompt: str | list[int]) -> list[int] | None:
    """The greedy continuation's ids."""
    completion = await client.generate(
        prompt, model=model, max_tokens=TOKENS, temperature=0.0, logprobs=0
    )
    return completion.tokens


async def complete_on(client: AsyncClient, model: str, ask: Ask) -> Completion:
    """A request of a load, made of another model."""
    options = ask.options
    options["model"] = model
    return await read(await client.generate(ask.prompt, stream=True, **options))


async def test_the_reference_alone_cached_and_crowded(shared: System, reference: Reference) -> None:
    async with shared.client() as client:
        model = (await client.add_model(FOLDER)).name
        assert await ids(client, model, PROMPT) == reference.output
        assert await ids(client, model, PROMPT) == reference.output, "with a cached prefix"
        grown = reference.prompt + reference.output[:100]
        rest = await client.generate(
            grown, model=model, max_tokens=TOKENS - 100, temperature=0.0, logprobs=0
        )
        assert rest.tokens == reference.output[100:], "with a cached prefix of its own"
        crowd = [msgspec.structs.replace(ask, prompt=PROMPT) for ask in load(32, 100)]
        others = asyncio.gather(*(complete_on(client, model, ask) for ask in crowd))
        assert await ids(client, model, PROMPT) == reference.output, "among 32 others"
        await others
        embedded, again = await asyncio.gather(
            complete(client, load(2, 60)[1]), ids(client, model, PROMPT)
        )
        assert again == reference.output and embedded.tokens, "beside another model's executor"
        await shared.until_settled(client)


async def test_the_reference_in_chunks_and_over_http(booted: Boot, reference: Reference) -> None:
    system = await asyncio.to_thread(booted, CHUNKED)
    async with system.client() as client:
        model = (await client.add_model(FOLDER)).name
        assert await ids(client, model, PROMPT) == reference.output
        url = (await client.status()).http
        body = {"model": model, "prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0}
        async with httpx.AsyncClient(base_url=url, timeout=60) as http:
            answer = await http.post("/v1/completions", json={**body, "echo": True})
            assert answer.status_code == 200, answer.text
            assert answer.json()["choices"][0]["text"] == reference.text
            pieces = []
            async with http.stream("POST", "/v1/completions", json={**body, "stream": True}) as it:
                async for line in it.aiter_lines():
                    if line.startswith("data: {"):
                        pieces += [choice["text"] for choice in json.loads(line[6:])["choices"]]
        assert PROMPT + "".join(pieces) == reference.text
        await system.until_settled(client)
