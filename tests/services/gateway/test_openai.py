"""The unmodified openai package against a real server."""

import openai
import pytest
from llmproto.errors import ErrorKind, RemoteError
from llmproto.models import DeploymentRow, DeploymentState

from .conftest import MODEL, Gateway, words


async def test_models(gateway: Gateway) -> None:
    found = [model.id async for model in gateway.openai.models.list()]
    assert found == [MODEL]
    assert (await gateway.openai.models.retrieve(MODEL)).owned_by == "llmos"
    with pytest.raises(openai.NotFoundError) as caught:
        await gateway.openai.models.retrieve("org/none")
    assert caught.value.code == "model_not_found"


async def test_a_deployment_is_a_model_by_its_name(gateway: Gateway) -> None:
    serves = DeploymentRow("bot", DeploymentState.LIVE, MODEL, MODEL, None, 1, 1)
    gateway.llm.deployed = [serves]
    assert [model.id async for model in gateway.openai.models.list()] == ["bot", MODEL]
    assert (await gateway.openai.models.retrieve("bot")).owned_by == "llmos"


async def test_completion(gateway: Gateway) -> None:
    answer = await gateway.openai.completions.create(model=MODEL, prompt="abc", max_tokens=4)
    assert answer.choices[0].text == "".join(words(4))
    assert answer.choices[0].finish_reason == "length"
    assert answer.model == MODEL
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3, 4)


async def test_completion_has_sixteen_tokens_unless_said(gateway: Gateway) -> None:
    answer = await gateway.openai.completions.create(model=MODEL, prompt="abc")
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 16


async def test_stop(gateway: Gateway) -> None:
    answer = await gateway.openai.completions.create(
        model=MODEL, prompt="stop", max_tokens=8, stop=["x", "y"]
    )
    assert answer.choices[0].finish_reason == "stop"
    assert gateway.llm.generates[0][0].stops == ["x", "y"]


async def test_prompts_and_choices_are_numbered_as_openai_numbers_them(gateway: Gateway) -> None:
    answer = await gateway.openai.completions.create(
        model=MODEL, prompt=["ab", "cde"], n=2, max_tokens=3
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    texts = ["".join(words(3, choice)) for choice in (0, 1)]
    assert [choice.text for choice in answer.choices] == texts * 2
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (5, 12)
    prompts = [generate.prompt for generate, _ in gateway.llm.generates]
    assert sorted(prompts, key=str) == ["ab", "cde"]


async def test_token_prompts(gateway: Gateway) -> None:
    create = gateway.openai.completions.create
    one = await create(model=MODEL, prompt=[1, 2, 3], max_tokens=1)
    two = await create(model=MODEL, prompt=[[1, 2], [3]], max_tokens=1)
    assert one.usage is not None and two.usage is not None
    assert (one.usage.prompt_tokens, two.usage.prompt_tokens) == (3, 3)
    assert len(two.choices) == 2


async def test_streamed_completion(gateway: Gateway) -> None:
    stream = await gateway.openai.completions.create(
        model=MODEL, prompt="abc", max_tokens=5, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    texts = [chunk.choices[0].text for chunk in chunks[:-1]]
    assert "".join(texts) == "".join(words(5))
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * 5 + ["length"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.total_tokens == 8
    assert len({chunk.id for chunk in chunks}) == 1


async def test_streamed_choices_arrive_whole(gateway: Gateway) -> None:
    stream = await gateway.openai.completions.create(
        model=MODEL, prompt=["ab", "cd"], n=2, max_tokens=5, stream=True
    )
    texts: dict[int, str] = {}
    async for chunk in stream:
        choice = chunk.choices[0]
        texts[choice.index] = texts.get(choice.index, "") + choice.text
    assert texts == {index: "".join(words(5, index % 2)) for index in range(4)}


async def test_legacy_logprobs(gateway: Gateway) -> None:
    answer = await gateway.openai.completions.create(
        model=MODEL, prompt="abc", max_tokens=3, logprobs=2
    )
    found = answer.choices[0].logprobs
    assert found is not None
    assert found.tokens == words(3)
    assert found.token_logprobs == [-0.5, -1.5, -2.5]
    assert found.top_logprobs is not None
    assert found.top_logprobs[1] == {" é01": -1.5, "x": -9.0}
    assert found.text_offset == [0, 4, 8]


async def test_echo_with_scores_of_the_prompt(gateway: Gateway) -> None:
    answer = await gateway.openai.completions.create(
        model=MODEL, prompt="äbc", max_tokens=2, logprobs=1, echo=True
    )
    choice = answer.choices[0]
    assert choice.text == "äbc" + "".join(words(2))
    assert choice.logprobs is not None
    assert choice.logprobs.tokens == ["ä", "b", "c", *words(2)]
    assert choice.logprobs.token_logprobs == [None, -1.0, -1.0, -0.5, -1.5]
    assert choice.logprobs.text_offset == [0, 1, 2, 3, 7]


async def test_scoring_without_generating(gateway: Gateway) -> None:
    answer = await gateway.openai.completions.create(
        model=MODEL, prompt=[1, 2, 3], max_tokens=0, logprobs=1, echo=True
    )
    choice = answer.choices[0]
    assert choice.text == "bcd"
    assert choice.finish_reason == "length"
    assert choice.logprobs is not None
    assert choice.logprobs.token_logprobs == [None, -1.0, -1.0]


async def test_echo_of_token_ids_needs_no_logprobs(gateway: Gateway) -> None:
    stream = await gateway.openai.completions.create(
        model=MODEL, prompt=[1, 2], max_tokens=1, echo=True, stream=True
    )
    chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].text for chunk in chunks) == "bc" + words(1)[0]
    assert all(chunk.choices[0].logprobs is None for chunk in chunks)


async def test_chat(gateway: Gateway) -> None:
    answer = await gateway.openai.chat.completions.create(
        model=MODEL,
        messages=[
            {"role": "developer", "content": "be short"},
            {
                "role": "user",
                "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
            },
        ],
        max_completion_tokens=3,
        logprobs=True,
        top_logprobs=1,
        user="somebody",
        metadata={"a": "b"},
    )
    choice = answer.choices[0]
    assert choice.message.content == "".join(words(3))
    assert choice.message.role == "assistant"
    assert choice.logprobs is not None and choice.logprobs.content is not None
    assert [token.logprob for token in choice.logprobs.content] == [-0.5, -1.5, -2.5]
    assert choice.logprobs.content[1].bytes == list(" é01".encode())
    assert choice.logprobs.content[1].top_logprobs[0].token == " é01"
    messages = gateway.llm.generates[0][0].messages
    assert messages is not None
    assert [(message.role, message.content) for message in messages] == [
        ("system", "be short"),
        ("user", "ab"),
    ]


async def test_chat_goes_on_until_the_context_is_full(gateway: Gateway) -> None:
    await gateway.openai.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "hi"}]
    )
    assert gateway.llm.generates[0][0].output_tokens_max is None


async def test_an_answer_can_be_sent_back(gateway: Gateway) -> None:
    create = gateway.openai.chat.completions.create
    first = await create(model=MODEL, messages=[{"role": "user", "content": "a"}], max_tokens=1)
    answer = await create(
        model=MODEL,
        messages=[{"role": "user", "content": "a"}, first.choices[0].message.model_dump()],  # type: ignore[list-item] # as users write it
        max_tokens=1,
    )
    assert answer.choices[0].message.content == words(1)[0]


async def test_streamed_chat(gateway: Gateway) -> None:
    stream = await gateway.openai.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "hi"}],
        max_tokens=4,
        n=2,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = [chunk async for chunk in stream]
    usage = chunks.pop().usage
    assert usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens) == (3, 8)
    for index in (0, 1):
        mine = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == index]
        assert mine[0].delta.role == "assistant"
        assert "".join(choice.delta.content or "" for choice in mine) == "".join(words(4, index))
        assert [choice.finish_reason for choice in mine] == [None] * 5 + ["length"]


async def test_streamed_chat_with_logprobs(gateway: Gateway) -> None:
    stream = await gateway.openai.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "hi"}],
        max_tokens=3,
        stream=True,
        logprobs=True,
    )
    found = []
    async for chunk in stream:
        logprobs = chunk.choices[0].logprobs
        if logprobs is not None and logprobs.content is not None:
            found += [(token.token, token.logprob) for token in logprobs.content]
    assert found == list(zip(words(3), [-0.5, -1.5, -2.5]))


async def test_sampling_reaches_the_system(gateway: Gateway) -> None:
    await gateway.openai.completions.create(
        model=MODEL,
        prompt="a",
        max_tokens=1,
        temperature=0,
        top_p=0.5,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        seed=-1,
        logit_bias={"7": -100},
        extra_body={
            "top_k": 3,
            "min_p": 0.1,
            "repetition_penalty": 1.1,
            "ignore_eos": True,
            "priority": 2,
        },
    )
    generate = gateway.llm.generates[0][0]
    sampling = generate.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (
        0,
        0.5,
        3,
        0.1,
    )
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (0.5, -0.5)
    assert (sampling.bias_tokens, sampling.bias_values) == ([7], [-100.0])
    assert sampling.seed == (1 << 53) - 1
    assert (sampling.repetition_penalty, sampling.ignore_eos, generate.priority) == (1.1, True, 2)


async def test_unknown_model(gateway: Gateway) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        await gateway.openai.completions.create(model="nope", prompt="a")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


async def test_context_too_long(gateway: Gateway) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        await gateway.openai.completions.create(model=MODEL, prompt="a" * 60, max_tokens=5)
    assert caught.value.code == "context_length_exceeded"


async def test_empty_prompt(gateway: Gateway) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        await gateway.openai.completions.create(model=MODEL, prompt="")
    assert caught.value.code == "invalid"


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        (ErrorKind.EXHAUSTED, 429),
        (ErrorKind.UNAVAILABLE, 503),
        (ErrorKind.DEADLINE, 504),
        (ErrorKind.DENIED, 403),
        (ErrorKind.STALE, 404),
        (ErrorKind.INTERNAL, 500),
    ],
)
async def test_refusals(gateway: Gateway, kind: ErrorKind, status: int) -> None:
    gateway.llm.refusal = RemoteError(kind, "so it is", retry_after_ms=1500)
    with pytest.raises(openai.APIStatusError) as caught:
        await gateway.openai.completions.create(model=MODEL, prompt="a")
    assert caught.value.status_code == status
    assert "so it is" in caught.value.message
    if kind in (ErrorKind.EXHAUSTED, ErrorKind.UNAVAILABLE):
        assert caught.value.response.headers["retry-after"] == "2"


async def test_failure_of_the_generation(gateway: Gateway) -> None:
    with pytest.raises(openai.InternalServerError):
        await gateway.openai.completions.create(model=MODEL, prompt="broken", max_tokens=2)


async def test_failure_in_mid_stream(gateway: Gateway) -> None:
    stream = await gateway.openai.completions.create(
        model=MODEL, prompt="broken", max_tokens=3, stream=True
    )
    text = ""
    with pytest.raises(openai.APIError, match="broke"):
        async for chunk in stream:
            text += chunk.choices[0].text
    assert text == "".join(words(2))


async def test_key_of_a_tenant_reaches_the_system(locked: Gateway) -> None:
    await locked.openai.completions.create(model=MODEL, prompt="a", max_tokens=1)
    assert locked.llm.generates[0][1] == 5
    wrong = locked.openai.with_options(api_key="wrong")
    with pytest.raises(openai.AuthenticationError) as caught:
        await wrong.completions.create(model=MODEL, prompt="a")
    assert caught.value.code == "invalid_api_key"


async def test_any_key_will_do_where_none_is_required(gateway: Gateway) -> None:
    wrong = gateway.openai.with_options(api_key="wrong")
    await wrong.completions.create(model=MODEL, prompt="a", max_tokens=1)
    assert gateway.llm.generates[0][1] is None
