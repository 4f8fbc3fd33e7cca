"""The library as its users know it, over real processes; the trained model's exact tokens through
every way in."""

import asyncio
import json
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from libllm.config import Home
from llmproto.errors import ErrorKind, RemoteError
from llmproto.operation import ThreadState
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

import libllm

from .conftest import Boot, System, run_llmos

MODEL = "llmos-mini"
STORIES = Path(__file__).parents[3] / "shared/assets/models/stories260k-llama"
PROMPT = "Once upon a time"
OUTPUT_TOKENS = 200

needs_stories = pytest.mark.skipif(not STORIES.exists(), reason="needs the stories260k model")


def test_the_example(served: System) -> None:
    """Generate, chat in a stream, look at the system."""
    with libllm.connect(served.home.root) as llm:
        done = llm.generate("The for statement", max_tokens=16, temperature=0.0)
        assert done.text and done.finish_reason == "length" and done.model == MODEL
        pieces = list(llm.chat([{"role": "user", "content": "Hi"}], stream=True, max_tokens=16))
        assert "".join(piece.text for piece in pieces)
        assert pieces[-1].finish_reason in ("stop", "length")
        for row in llm.ps():
            assert row.name and row.pid and row.incarnation and row.uptime_ms >= 0
        assert [row.model.name for row in llm.models()] == [MODEL]
        assert all(row.state is ThreadState.ENDED for row in llm.threads()) and llm.status().ready
        assert llm.tokenize("The for statement")


async def test_the_example_without_waiting(served: System) -> None:
    async with await libllm.connect_async(served.home.root) as llm:
        one, other = await asyncio.gather(
            *(llm.generate("A list is", max_tokens=16, seed=seed) for seed in (4, 4))
        )
        assert one.text == other.text
        stream = await llm.chat([{"role": "user", "content": "Hi"}], stream=True, max_tokens=16)
        assert "".join([piece.text async for piece in stream])


def test_connecting_boots(booted: Boot) -> None:
    """`start=True` finds what runs, or boots it; it stays, and keeps its models over a reboot."""
    system = booted()
    system.stop()
    with pytest.raises(RemoteError) as caught:
        libllm.connect(system.home.root)
    assert caught.value.kind is ErrorKind.UNAVAILABLE
    with libllm.connect(system.home.root, start=True) as llm:
        assert llm.generate("A list is", max_tokens=4, ignore_eos=True).usage.output_tokens == 4
        if STORIES.exists():
            llm.add_model(STORIES, "stories")
        names = [row.model.name for row in llm.models()]
    system.stop()
    with libllm.connect(system.home.root, start=True) as llm:
        assert [row.model.name for row in llm.models()] == names
        assert llm.generate("A list is", max_tokens=4, ignore_eos=True).usage.output_tokens == 4


def test_a_stream_that_is_left(served: System) -> None:
    """It is cancelled; detached it can be read on, by another client too."""
    with libllm.connect(served.home.root) as llm:
        with llm.generate("A list is", stream=True, ignore_eos=True) as pieces:
            next(pieces)
        whole = llm.generate("A list is", max_tokens=300, seed=3, ignore_eos=True).text
        left = llm.generate(
            "A list is", stream=True, resumable=True, max_tokens=300, seed=3, ignore_eos=True
        )
        first = next(left)
        ((stream, _),) = left.detach()
    with libllm.connect(served.home.root) as llm:
        rest = "".join(piece.text for piece in llm.resume(stream, first.offset))
    assert first.text + rest == whole
    del left  # Forgetting what a closed client had left is nothing.


@pytest.fixture(scope="module")
def reference() -> tuple[list[int], str]:
    """Ids and text of the reference implementation's greedy continuation."""
    tokenizer = Tokenizer.from_file(str(STORIES / "tokenizer.json"))
    prompt = tokenizer.encode(PROMPT).ids
    # Any: the library's types do not let `generate` be called.
    model: Any = AutoModelForCausalLM.from_pretrained(STORIES, dtype=torch.float32)
    ids = model.generate(torch.tensor([prompt]), max_new_tokens=OUTPUT_TOKENS, do_sample=False)
    output = ids[0, len(prompt) :].tolist()
    whole: str = tokenizer.decode(ids[0].tolist())
    start: str = tokenizer.decode(prompt)
    return output, whole.removeprefix(start)


@needs_stories
def test_the_reference_tokens(served: System, reference: tuple[list[int], str]) -> None:
    """The same through `run`, HTTP and the library."""
    output, text = reference
    options = ["--max-tokens", str(OUTPUT_TOKENS), "--temperature", "0", "--json"]
    done = run_llmos("run", str(STORIES), PROMPT, *options, home=served.home.root)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    with libllm.connect(served.home.root) as llm:
        try:
            ours = llm.generate(
                PROMPT,
                model=document["model"],
                max_tokens=OUTPUT_TOKENS,
                temperature=0.0,
                logprobs=0,
            )
            with openai.OpenAI(base_url=f"{llm.status().http}/v1", api_key="any") as client:
                theirs = client.completions.create(
                    model=document["model"],
                    prompt=PROMPT,
                    max_tokens=OUTPUT_TOKENS,
                    temperature=0,
                )
        finally:
            llm.remove_model(document["model"])
    assert document["tokens"] == ours.tokens == output
    assert document["text"] == ours.text == theirs.choices[0].text == text


def test_nothing_runs(tmp_path: Path) -> None:
    with pytest.raises(RemoteError) as caught:
        libllm.connect(tmp_path)
    assert caught.value.kind is ErrorKind.UNAVAILABLE
    assert not Home(tmp_path).run.exists()
