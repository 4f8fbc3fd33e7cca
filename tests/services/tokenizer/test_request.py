"""prepare: every mistake is refused with its numbers; nothing is cut in silence."""

from datetime import datetime

import msgspec
import pytest
import tokenizers
from llmproto.errors import ErrorKind, RemoteError
from llmproto.generation import ChatMessage, Generate, Sampling
from llmservices.texts.tokenizer_config import TokenizerConfig
from llmservices.tokenizer.folder import ModelFolder
from llmservices.tokenizer.request import Prepared, content_digest, encode_prompt, prepare
from llmservices.tokenizer.vocabulary import Vocabulary

NOW = datetime(2026, 1, 2)
FOLDER = ModelFolder(
    path="/models/m",
    architecture="LlamaForCausalLM",
    model_type="llama",
    context_tokens=10,
    vocab_tokens=300,
    eos_tokens=(2, 7),
    bos_token=1,
    dtype="float32",
    weight_bytes=0,
    weight_files=(),
    has_chat_template=False,
    digest=bytes(16),
    tokenizer_digest=bytes(16),
)
KEY = bytes(16)
CHAT = [ChatMessage(role="user", content="ab")]
Vocabularies = dict[str, Vocabulary]


def prepared(vocabulary: Vocabulary, generate: Generate) -> Prepared:
    return prepare(generate, vocabulary, FOLDER, now=NOW)


def test_a_prompt(vocabularies: Vocabularies) -> None:
    vocabulary = vocabularies["fallback"]
    made = prepared(vocabulary, Generate(key=KEY, prompt="ab a"))
    assert made.tokens == vocabulary.encode("ab a")
    assert made.tokens[0] == 1
    assert made.output_tokens_max == 10 - len(made.tokens)
    assert (made.sampling.stop_tokens, made.hidden) == ([2, 7], [2, 7])
    assert made.prompt_texts == []


@pytest.mark.parametrize(
    ("generate", "tokens", "output_tokens_max"),
    [
        (Generate(key=KEY, prompt_tokens=[5] * 10, output_tokens_max=0), [5] * 10, 0),
        (Generate(key=KEY, prompt_tokens=[5] * 4, output_tokens_max=6), [5] * 4, 6),
        (Generate(key=KEY, prompt_tokens=[5] * 4), [5] * 4, 6),
        (Generate(key=KEY, prompt_tokens=[299]), [299], 9),
        (Generate(key=KEY, prompt=""), [1], 9),  # this tokenizer begins even an empty text
    ],
)
def test_room(
    generate: Generate, tokens: list[int], output_tokens_max: int, vocabularies: Vocabularies
) -> None:
    made = prepared(vocabularies["fallback"], generate)
    assert (made.tokens, made.output_tokens_max) == (tokens, output_tokens_max)


@pytest.mark.parametrize(
    ("generate", "said"),
    [
        (Generate(key=KEY), "exactly one of prompt, prompt_tokens and messages; 0 were"),
        (Generate(key=KEY, prompt="a", messages=CHAT), "2 were given"),
        (Generate(key=KEY, prompt_tokens=[]), "the prompt is empty"),
        (Generate(key=KEY, messages=[]), "the chat is empty"),
        (Generate(key=KEY, messages=CHAT), "no chat template"),
        (Generate(key=KEY, prompt_tokens=[300]), "300 is not below the model's vocabulary of 300"),
        (Generate(key=KEY, prompt_tokens=[5] * 11), "11 tokens, the model's context 10"),
        (Generate(key=KEY, prompt_tokens=[5] * 10), "10 tokens fill the context of 10"),
        (
            Generate(key=KEY, prompt_tokens=[5] * 4, output_tokens_max=7),
            "4 tokens and 7 more are asked for, together 11; the model's context is 10",
        ),
        (
            Generate(key=KEY, prompt="a", sampling=Sampling(bias_tokens=[1], bias_values=[])),
            "1 bias_tokens but 0 bias_values",
        ),
        (
            Generate(key=KEY, prompt="a", sampling=Sampling(bias_tokens=[301], bias_values=[1.0])),
            "bias_tokens: token id 301",
        ),
        (
            Generate(key=KEY, prompt="a", sampling=Sampling(stop_tokens=[302])),
            "stop_tokens: token id 302",
        ),
        (
            Generate(key=KEY, prompt="a", sampling=Sampling(stop_tokens=list(range(10, 74)))),
            "66 stop tokens with the model's own, more than 64",
        ),
        (Generate(key=KEY, prompt="a", stops=["é" * 129]), "258 bytes; it must have 1 to 256"),
        (Generate(key=KEY, prompt="a", stops=["x"] * 17), "17 stop strings, more than 16"),
        (Generate(key=KEY, prompt="é" * 450_001), "900002 bytes, more than 900000"),
        (Generate(key=KEY, prompt="\ud800"), "surrogates"),
    ],
)
def test_refusals(generate: Generate, said: str, vocabularies: Vocabularies) -> None:
    with pytest.raises(RemoteError) as caught:
        prepared(vocabularies["fallback"], generate)
    assert caught.value.kind is ErrorKind.INVALID
    assert said in caught.value.detail


def test_an_empty_text_without_special_tokens_is_empty(vocabularies: Vocabularies) -> None:
    with pytest.raises(RemoteError, match="the prompt is empty"):
        prepared(vocabularies["byte_level"], Generate(key=KEY, prompt=""))


def test_stop_tokens(vocabularies: Vocabularies) -> None:
    vocabulary = vocabularies["fallback"]
    own = Generate(key=KEY, prompt="a", sampling=Sampling(stop_tokens=[7, 9]))
    made = prepared(vocabulary, own)
    assert (made.sampling.stop_tokens, made.hidden) == ([7, 9, 2], [2, 7, 9])
    on = Generate(key=KEY, prompt="a", sampling=Sampling(stop_tokens=[9], ignore_eos=True))
    assert prepared(vocabulary, on).sampling.stop_tokens == [9]


def test_prompt_texts(vocabularies: Vocabularies) -> None:
    sampling = Sampling(logprobs=0, prompt_logprobs=True)
    made = prepared(vocabularies["fallback"], Generate(key=KEY, prompt="ab", sampling=sampling))
    assert made.prompt_texts == ["<s>", " a", "b"]
    ids = Generate(key=KEY, prompt_tokens=[1], sampling=sampling)
    assert prepared(vocabularies["fallback"], ids).prompt_texts == []


def test_choices_sample_with_their_own_seed(vocabularies: Vocabularies) -> None:
    sampling = Sampling(seed=(1 << 53) - 1)
    made = prepared(vocabularies["fallback"], Generate(key=KEY, prompt="a", sampling=sampling))
    assert [made.sampling_of(choice).seed for choice in (0, 1, 2)] == [(1 << 53) - 1, 0, 1]


def test_the_digest_is_of_the_content() -> None:
    one = Generate(key=KEY, prompt="a")
    again = msgspec.structs.replace(one, key=bytes([1]) * 16)
    other = msgspec.structs.replace(one, prompt="b")
    assert content_digest(one) == content_digest(again) != content_digest(other)
    assert len(content_digest(one)) == 16


def test_a_chat(byte_level_vocabulary: Vocabulary) -> None:
    made = prepare(Generate(key=KEY, messages=CHAT), byte_level_vocabulary, FOLDER, now=NOW)
    assert made.tokens == byte_level_vocabulary.encode_rendered("<s>ab</s>")
    asked = encode_prompt(byte_level_vocabulary, FOLDER, prompt=None, messages=CHAT, now=NOW)
    assert asked == made.tokens
    with pytest.raises(RemoteError, match="exactly one"):
        encode_prompt(byte_level_vocabulary, FOLDER, prompt="a", messages=CHAT, now=NOW)


def test_named_templates_without_a_default(
    byte_level_tokenizer: tokenizers.Tokenizer,
) -> None:
    config = TokenizerConfig(
        named={}, special=(), extra=(), added={}, chat_template=None, template_names=("tool_use",)
    )
    vocabulary = Vocabulary(byte_level_tokenizer, config, digest=bytes(16))
    with pytest.raises(RemoteError, match="tool_use, none of them `default`"):
        prepared(vocabulary, Generate(key=KEY, messages=CHAT))
