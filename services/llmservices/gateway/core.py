"""OpenAI's requests as the system's: what each prompt is asked, and which choice each stream is.

Pure: the key of the request and its seed, where the caller gave none, come as arguments.
"""

from typing import Final

import msgspec
from llmproto import limits
from llmproto.generation import ChatMessage, Generate, Sampling

from llmservices.gateway.bodies import ChatBody, CompletionBody, MessageBody, SamplingBody, Stops
from llmservices.gateway.errors import invalid_field
from llmservices.gateway.sse import StreamName, moved

CHOICES_TOTAL_MAX: Final = 1024
"""Prompts times `n`: what one HTTP request may hold of the tables."""
SEEDS: Final = 1 << 53
TOP_P_MIN: Final = 1e-9
"""For 0, which OpenAI allows: the most likely token alone."""


class Wanted(msgspec.Struct, frozen=True):
    """One HTTP request.  Prompt p is generates[p]; choice c of it is number p * choices + c."""

    generates: list[Generate]
    """One for each prompt; keys count up from the first."""
    choices: int
    """For each prompt."""
    chat: bool
    stream: bool = False
    include_usage: bool = False
    shows_logprobs: bool = False
    echo: bool = False

    @property
    def key(self) -> bytes:
        """Of the request."""
        return self.generates[0].key

    @property
    def total(self) -> int:
        """Choices of all prompts."""
        return len(self.generates) * self.choices

    def names(self, created_s: int) -> list[StreamName]:
        """Every choice's stream, in order."""
        return [
            StreamName(
                generate.key + bytes((choice,)),
                chat=self.chat,
                usage=self.include_usage,
                scored=self.shows_logprobs,
                index=prompt * self.choices + choice,
                prompt=prompt,
                created_s=created_s,
            )
            for prompt, generate in enumerate(self.generates)
            for choice in range(self.choices)
        ]


def completion(body: CompletionBody, *, key: bytes, seed: int, resumable: bool) -> Wanted:
    """What /v1/completions asks for; HttpError(400) where it cannot be done."""
    prompts = _prompts(body)
    choices = body.n or 1
    if body.best_of is not None and body.best_of != choices:
        raise invalid_field(
            f"best_of is {body.best_of} and n is {choices}: only n choices are made, and all of "
            "them returned; leave best_of out",
            "best_of",
        )
    if len(prompts) * choices > CHOICES_TOTAL_MAX:
        raise invalid_field(
            f"{len(prompts)} prompts with n = {choices} are {len(prompts) * choices} choices; one "
            f"request makes at most {CHOICES_TOTAL_MAX}",
            "prompt",
        )
    echo = bool(body.echo)
    reads_prompt = echo and (body.logprobs is not None or not isinstance(prompts[0], str))
    sampling = _sampling(
        body, seed, logprobs=0 if reads_prompt and body.logprobs is None else body.logprobs
    )
    if reads_prompt:
        sampling = msgspec.structs.replace(sampling, prompt_logprobs=True)
    generates = [
        Generate(
            key=moved(key, number),
            model=body.model,
            prompt=prompt if isinstance(prompt, str) else None,
            prompt_tokens=prompt if isinstance(prompt, list) else None,
            output_tokens_max=16 if body.max_tokens is None else body.max_tokens,
            sampling=sampling,
            stops=_stops(body.stop),
            choices=choices,
            priority=body.priority or 0,
            resumable=resumable,
        )
        for number, prompt in enumerate(prompts)
    ]
    if resumable and echo:
        raise invalid_field("echo and Llmos-Resumable exclude each other: choose one", "echo")
    return _wanted(body, generates, chat=False, shows=body.logprobs is not None, echo=echo)


def chat(body: ChatBody, *, key: bytes, seed: int, resumable: bool) -> Wanted:
    """What /v1/chat/completions asks for; HttpError(400) where it cannot be done."""
    if body.max_tokens is not None and body.max_completion_tokens is not None:
        raise invalid_field(
            "max_tokens and max_completion_tokens exclude each other: send the latter",
            "max_completion_tokens",
        )
    if body.top_logprobs is not None and not body.logprobs:
        raise invalid_field("top_logprobs needs logprobs: true", "top_logprobs")
    longest = body.max_completion_tokens
    generate = Generate(
        key=key,
        model=body.model,
        messages=[_message(message, number) for number, message in enumerate(body.messages)],
        output_tokens_max=longest if longest is not None else body.max_tokens,
        sampling=_sampling(
            body, seed, logprobs=(body.top_logprobs or 0) if body.logprobs else None
        ),
        stops=_stops(body.stop),
        choices=body.n or 1,
        priority=body.priority or 0,
        resumable=resumable,
    )
    return _wanted(body, [generate], chat=True, shows=bool(body.logprobs), echo=False)


def _wanted(
    body: SamplingBody, generates: list[Generate], *, chat: bool, shows: bool, echo: bool
) -> Wanted:
    options = body.stream_options
    if options is not None and not body.stream:
        raise invalid_field("stream_options needs stream: true", "stream_options")
    if generates[0].resumable and not body.stream:
        raise invalid_field("Llmos-Resumable needs stream: true", "stream")
    return Wanted(
        generates=generates,
        choices=generates[0].choices,
        chat=chat,
        stream=bool(body.stream),
        include_usage=options is not None and bool(options.include_usage),
        shows_logprobs=shows,
        echo=echo,
    )


def _sampling(body: SamplingBody, seed: int, *, logprobs: int | None) -> Sampling:
    """null and absent mean the same; a seed of any sign is one of the system's."""
    biases = {_token(key): value for key, value in (body.logit_bias or {}).items()}
    return Sampling(
        temperature=1.0 if body.temperature is None else body.temperature,
        top_k=max(body.top_k or 0, 0),
        top_p=1.0 if body.top_p is None else max(body.top_p, TOP_P_MIN),
        min_p=body.min_p or 0.0,
        repetition_penalty=1.0 if body.repetition_penalty is None else body.repetition_penalty,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        bias_tokens=list(biases),
        bias_values=list(biases.values()),
        seed=(seed if body.seed is None else body.seed) % SEEDS,
        logprobs=logprobs,
        ignore_eos=bool(body.ignore_eos),
        stop_tokens=body.stop_token_ids or [],
    )


def _token(text: str) -> int:
    if text.isascii() and text.isdigit() and len(text) <= 8 and int(text) <= limits.TOKEN_ID_MAX:
        return int(text)
    raise invalid_field(f"logit_bias: {text[:32]!r} is no token id", "logit_bias")


def _stops(stop: "str | Stops | None") -> list[str]:
    stops = [] if stop is None else [stop] if isinstance(stop, str) else stop
    for each in stops:
        used = len(each.encode())
        if used > limits.STOP_BYTES_MAX:
            raise invalid_field(
                f"a stop string has {used} bytes, more than {limits.STOP_BYTES_MAX}", "stop"
            )
    return stops


def _prompts(body: CompletionBody) -> "list[str | list[int]]":
    """Each prompt, of the four shapes that OpenAI's API gives them."""
    prompt = body.prompt
    if isinstance(prompt, str):
        return [prompt]
    kinds = {type(part) for part in prompt}
    if kinds == {int}:
        return [[part for part in prompt if isinstance(part, int)]]
    if kinds == {str} or kinds == {list}:
        return [part for part in prompt if not isinstance(part, int)]
    if not prompt:
        raise invalid_field("the prompt is empty: send at least one text or token", "prompt")
    raise invalid_field("prompt mixes texts and tokens: send one kind", "prompt")


def _message(message: MessageBody, number: int) -> ChatMessage:
    """One turn, its parts joined."""
    content = message.content
    if isinstance(content, list):
        content = "".join(part.text for part in content)
    if content is None and message.role != "assistant":
        where = f"messages[{number}].content"
        raise invalid_field(f"{where} is missing", where)
    role = "system" if message.role == "developer" else message.role
    return ChatMessage(role, content or "")
