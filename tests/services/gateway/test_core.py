"""Bodies and requests as tables: what is asked of the system, what is refused and why."""

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from llmproto.generation import ChatMessage, Generate, Sampling
from llmservices.gateway import core
from llmservices.gateway.bodies import ChatBody, CompletionBody, decode
from llmservices.gateway.errors import ErrorDetail, HttpError
from llmservices.gateway.sse import Mark, StreamName, moved, read_id, read_name

KEY = bytes(15) + b"\x07"
HELLO = [{"role": "user", "content": "hi"}]


def text(body: dict[str, Any], *, resumable: bool = False) -> core.Wanted:
    """What a body of /v1/completions asks for."""
    read = decode(json.dumps(body).encode(), CompletionBody)
    return core.completion(read, key=KEY, seed=11, resumable=resumable)


def chat(body: dict[str, Any], *, resumable: bool = False) -> core.Wanted:
    """What a body of /v1/chat/completions asks for."""
    read = decode(json.dumps(body).encode(), ChatBody)
    return core.chat(read, key=KEY, seed=11, resumable=resumable)


def refusal(kind: type[CompletionBody] | type[ChatBody], body: Any) -> ErrorDetail:
    """The error of a body, which may be anything."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    with pytest.raises(HttpError) as caught:
        if kind is CompletionBody:
            read = decode(data, CompletionBody)
            core.completion(read, key=KEY, seed=1, resumable=False)
        else:
            core.chat(decode(data, ChatBody), key=KEY, seed=1, resumable=False)
    assert caught.value.status == 400
    return caught.value.body.error


def test_the_least_completion() -> None:
    assert text({"prompt": "a"}) == core.Wanted(
        [Generate(key=KEY, prompt="a", output_tokens_max=16, sampling=Sampling(seed=11))],
        choices=1,
        chat=False,
    )


def test_the_least_chat() -> None:
    assert chat({"messages": HELLO}) == core.Wanted(
        [Generate(key=KEY, messages=[ChatMessage("user", "hi")], sampling=Sampling(seed=11))],
        choices=1,
        chat=True,
    )


def test_prompts_have_keys_of_their_own() -> None:
    wanted = text({"prompt": ["a", "b"], "n": 2, "stream": True})
    assert [generate.key[-1] for generate in wanted.generates] == [7, 8]
    names = wanted.names(5)
    assert [(name.stream[15:], name.index, name.prompt) for name in names] == [
        (b"\x07\x00", 0, 0),
        (b"\x07\x01", 1, 0),
        (b"\x08\x00", 2, 1),
        (b"\x08\x01", 3, 1),
    ]
    assert {name.completion for name in names} == {"cmpl-" + KEY.hex()}


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"prompt": [1, 2]}, (None, [1, 2])),
        ({"prompt": [[1, 2]]}, (None, [1, 2])),
        ({"prompt": ["x"]}, ("x", None)),
        ({"prompt": ""}, ("", None)),
        ({"prompt": [[]]}, (None, [])),
    ],
)
def test_prompts(body: dict[str, Any], expected: tuple[str | None, list[int] | None]) -> None:
    generate = text(body).generates[0]
    assert (generate.prompt, generate.prompt_tokens) == expected


@pytest.mark.parametrize(
    ("body", "logprobs", "prompt_logprobs"),
    [
        ({}, None, False),
        ({"logprobs": 0}, 0, False),
        ({"echo": True}, None, False),
        ({"echo": True, "logprobs": 3}, 3, True),
        ({"echo": True, "prompt": [1]}, 0, True),
    ],
)
def test_logprobs(body: dict[str, Any], logprobs: int | None, prompt_logprobs: bool) -> None:
    sampling = text({"prompt": "a", **body}).generates[0].sampling
    assert (sampling.logprobs, sampling.prompt_logprobs) == (logprobs, prompt_logprobs)


@pytest.mark.parametrize(
    ("body", "changes"),
    [
        ({"temperature": None, "top_p": None, "n": None, "stop": None}, {}),
        ({"top_k": -1, "top_p": 0}, {"top_k": 0, "top_p": core.TOP_P_MIN}),
        ({"seed": -1}, {"seed": (1 << 53) - 1}),
        ({"seed": 1 << 53}, {"seed": 0}),
        ({"logit_bias": {"3": 1.5}}, {"bias_tokens": [3], "bias_values": [1.5]}),
        ({"stop_token_ids": [4]}, {"stop_tokens": [4]}),
    ],
)
def test_sampling(body: dict[str, Any], changes: dict[str, Any]) -> None:
    expected = msgspec.structs.replace(Sampling(seed=11), **changes)
    assert text({"prompt": "a", **body}).generates[0].sampling == expected


def test_what_is_harmless_is_ignored_and_what_asks_for_nothing_too() -> None:
    body = {"user": "x", "metadata": {}, "store": True, "tools": None, "tool_choice": "none"}
    assert chat({"messages": HELLO, **body}) == chat({"messages": HELLO})


@pytest.mark.parametrize(
    ("body", "param", "part"),
    [
        ({}, None, "prompt"),
        ({"prompt": 3}, "prompt", "Expected"),
        ({"prompt": "a", "max_tokens": -1}, "max_tokens", ">= 0"),
        ({"prompt": "a", "max_tokens": 1.5}, "max_tokens", "int"),
        ({"prompt": "a", "temperature": 1000}, "temperature", "<= 100"),
        ({"prompt": "a", "temperature": "0"}, "temperature", "float"),
        ({"prompt": "a", "top_p": 2}, "top_p", "<= 1"),
        ({"prompt": "a", "n": 0}, "n", ">= 1"),
        ({"prompt": "a", "n": 129}, "n", "128"),
        ({"prompt": "a", "stop": ""}, "stop", "length"),
        ({"prompt": "a", "stop": ["é" * 200]}, "stop", "400"),
        ({"prompt": "a", "stop": ["a"] * 17}, "stop", "16"),
        ({"prompt": "a", "logprobs": 21}, "logprobs", "20"),
        ({"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias", "'x'"),
        ({"prompt": "a", "logit_bias": {"1": 101}}, "logit_bias[...]", "100"),
        ({"prompt": "a", "best_of": 3}, "best_of", "3"),
        ({"prompt": "a", "suffix": "b"}, "suffix", "not supported"),
        ({"prompt": "a", "nonsense": 1}, "nonsense", "nonsense"),
        ({"prompt": "a", "stream_options": {"include_usage": True}}, "stream_options", "stream"),
        ({"prompt": "a", "model": ""}, "model", "length"),
        ({"prompt": []}, "prompt", "empty"),
        ({"prompt": ["a", 1]}, "prompt", "mixes"),
        ({"prompt": ["a"] * 600, "n": 2}, "prompt", "1200"),
        ({"prompt": [[1, -1]]}, "prompt[0][1]", ">= 0"),
    ],
)
def test_bad_completions(body: dict[str, Any], param: str | None, part: str) -> None:
    error = refusal(CompletionBody, body)
    assert (error.param, error.type) == (param, "invalid_request_error")
    assert part in error.message


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, None),
        ({"messages": HELLO, "tools": [{"type": "function"}]}, "tools"),
        ({"messages": HELLO, "functions": [{}]}, "functions"),
        ({"messages": HELLO, "response_format": {"type": "json_schema"}}, "response_format"),
        ({"messages": HELLO, "modalities": ["text", "audio"]}, "modalities"),
        ({"messages": HELLO, "top_logprobs": 2}, "top_logprobs"),
        ({"messages": HELLO, "max_tokens": 1, "max_completion_tokens": 1}, "max_completion_tokens"),
        ({"messages": HELLO, "prompt": "a"}, "prompt"),
    ],
)
def test_bad_chats(body: dict[str, Any], param: str | None) -> None:
    error = refusal(ChatBody, body)
    if param is not None:
        assert error.param == param


@pytest.mark.parametrize(
    ("body", "part"),
    [
        (b"", "truncated"),
        (b'{"prompt": ', "truncated"),
        (b'{"prompt": nope}', "byte 12"),
        (b"[]", "object"),
        (b"\xff\xfe", "byte 0"),
        (b'{"prompt": "\xff"}', ""),
        (b'{"prompt": "\\ud800"}', ""),
        (b"[" * 4000, ""),
        (b'{"prompt":' + b"[" * 4000, ""),
        (b'{"prompt": "a", "temperature": 1e999}', "range"),
        (b'{"prompt": "a", "temperature": NaN}', ""),
    ],
)
def test_bad_json(body: bytes, part: str) -> None:
    assert part in refusal(CompletionBody, body).message


@given(
    st.binary(min_size=17, max_size=17),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.tuples(st.integers(0, 1023), st.integers(0, 1023), st.integers(0, 10**10)),
    st.tuples(st.integers(0, 10**6), st.integers(0, 10**6), st.integers(0, 10**6)),
    st.sampled_from(["", "f", "u"]),
)
def test_names_and_ids_are_read_back(
    stream: bytes,
    is_chat: bool,
    usage: bool,
    scored: bool,
    numbers: tuple[int, int, int],
    counts: tuple[int, int, int],
    stage: Any,
) -> None:
    name = StreamName(stream, is_chat, usage, scored, *numbers)
    mark = Mark(*counts, stage)
    assert read_name(str(name)) == name
    assert read_id(mark.of(name)) == (name, mark)


@given(st.text(max_size=80))
def test_other_names_are_refused(text: str) -> None:
    for read in (read_name, read_id):
        with pytest.raises(HttpError):
            read(text)


def test_keys_wrap() -> None:
    assert moved(b"\xff" * 16, 1) == bytes(16)
    assert moved(bytes(16), -1) == b"\xff" * 16
