"""/v1/embeddings and /v1/classify: the unmodified openai package, and raw HTTP."""

import base64
import math
import struct
from typing import Any

import openai
import pytest

from .conftest import CLASSIFIER, CONTEXT, EMBEDDER, Gateway


async def test_one_text(gateway: Gateway) -> None:
    answer = await gateway.openai.embeddings.create(model=EMBEDDER, input="abc")
    assert [row.embedding for row in answer.data] == [[3.0, 0.0, 0.5]]
    assert (answer.model, answer.usage.prompt_tokens, answer.usage.total_tokens) == (EMBEDDER, 3, 3)


async def test_every_shape_of_input(gateway: Gateway) -> None:
    create = gateway.openai.embeddings.create
    texts = await create(model=EMBEDDER, input=["a", "bb", "ccc"])
    assert [(row.index, row.embedding[:2]) for row in texts.data] == [
        (0, [1.0, 0.0]),
        (1, [2.0, 1.0]),
        (2, [3.0, 2.0]),
    ]
    ids = await create(model=EMBEDDER, input=[5, 6])
    assert ids.usage.prompt_tokens == 2
    lists = await create(model=EMBEDDER, input=[[5, 6], [7]])
    assert [row.embedding[0] for row in lists.data] == [2.0, 1.0]
    assert gateway.llm.encodes[-1][0].tokens == [[5, 6], [7]]


async def test_base64_and_floats_are_the_same_numbers(gateway: Gateway) -> None:
    said = []
    for form in ("float", "base64"):
        body = {"model": EMBEDDER, "input": "abcd", "encoding_format": form}
        answer = await gateway.http.post("/v1/embeddings", json=body)
        said.append(answer.json()["data"][0]["embedding"])
    assert said[0] == [4.0, 0.0, 0.5]
    assert struct.unpack("<3f", base64.b64decode(said[1])) == (4.0, 0.0, 0.5)


async def test_dimensions_cut_and_bring_back_to_length_one(gateway: Gateway) -> None:
    answer = await gateway.openai.embeddings.create(
        model=EMBEDDER, input=["a", "abc"], dimensions=2
    )
    assert len(answer.data[0].embedding) == 2
    assert math.hypot(*answer.data[1].embedding) == pytest.approx(1.0, abs=1e-6)
    with pytest.raises(openai.BadRequestError, match="4 dimensions are asked for; the model") as e:
        await gateway.openai.embeddings.create(model=EMBEDDER, input="a", dimensions=4)
    assert e.value.param == "dimensions"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": ["a", ""]}, "input"),
        ({"input": ["a", 5]}, "input"),
        ({"input": [[]]}, "input"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format"),
        ({"input": "a", "dimensions": 0}, "dimensions"),
        ({"input": "a", "colour": 1}, "colour"),
        ({}, None),
    ],
)
async def test_bad_input(gateway: Gateway, body: dict[str, Any], param: str | None) -> None:
    answer = await gateway.http.post("/v1/embeddings", json={"model": EMBEDDER, **body})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert not gateway.llm.encodes


async def test_an_unknown_model_and_a_long_input_have_openais_codes(gateway: Gateway) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        await gateway.openai.embeddings.create(model="org/none", input="a")
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as long:
        await gateway.openai.embeddings.create(model=EMBEDDER, input="a" * (CONTEXT + 1))
    assert (long.value.code, long.value.param) == ("context_length_exceeded", "input")
    body = {"model": EMBEDDER, "input": "a" * (CONTEXT + 1), "truncate": True}
    assert (await gateway.http.post("/v1/embeddings", json=body)).status_code == 200


async def test_the_keys_tenant_asks(gateway: Gateway) -> None:
    await gateway.openai.embeddings.create(model=EMBEDDER, input="abc")
    assert gateway.llm.encodes[0][1] is not None


async def test_classify(gateway: Gateway) -> None:
    body = {"model": CLASSIFIER, "input": ["abc", "de"], "pairs": ["x", "y"]}
    answer = (await gateway.http.post("/v1/classify", json=body)).json()
    assert [row["label"] for row in answer["data"]] == ["long", "long"]
    assert answer["labels"] == ["long", "late", "half"]
    row = answer["data"][0]
    total = math.exp(3) + 1 + math.exp(0.5)
    assert row["probs"] == pytest.approx([math.exp(3) / total, 1 / total, math.exp(0.5) / total])
    assert (row["num_classes"], answer["usage"]["prompt_tokens"]) == (3, 5)
    assert gateway.llm.encodes[0][0].pairs == ["x", "y"]


async def test_pairs_that_do_not_match_are_refused(gateway: Gateway) -> None:
    body = {"model": CLASSIFIER, "input": ["abc", "de"], "pairs": ["x"]}
    answer = await gateway.http.post("/v1/classify", json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"] == "2 inputs and 1 pairs: send one for each"
