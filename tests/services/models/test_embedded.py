"""The embedded model as committed: it is small, its files agree, and it writes of Python."""

import itertools
import json
import re
from pathlib import Path
from typing import Any

import jinja2.sandbox
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from llmservices.models import embedded_corpus
from safetensors import safe_open
from tokenizers import Tokenizer

Model = Any
"""transformers' own LlamaForCausalLM: absent where the tests skip, and `generate` is half typed."""

FOLDER = Path(embedded_corpus.__file__).parent / "embedded"
FOLDER_BYTES_MAX = 4_000_000
HELD_OUT_LOSS_MAX = 3.3
"""Nats a token; a uniform guess over the vocabulary has 7.6."""
TOKENS = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
CORPUS = embedded_corpus.read()
WORD = re.compile(r"[a-z]+")
SPECIAL = ("<|bos|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>")


def settings(name: str) -> dict[str, object]:
    content = json.loads((FOLDER / name).read_text(encoding="utf-8"))
    assert isinstance(content, dict)
    return content


def refuse(reason: str) -> None:
    raise jinja2.TemplateError(reason)


def rendered(messages: list[dict[str, str]], *, add_generation_prompt: bool) -> str:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment()
    environment.globals["raise_exception"] = refuse
    template = environment.from_string((FOLDER / "chat_template.jinja").read_text("utf-8"))
    return template.render(
        messages=messages, bos_token="<|bos|>", add_generation_prompt=add_generation_prompt
    )


@pytest.fixture(scope="module")
def model() -> Model:
    transformers = pytest.importorskip("transformers")
    return transformers.LlamaForCausalLM.from_pretrained(FOLDER).eval()


def continued(model: Model, text: str, tokens_max: int, *, tokens_min: int = 0) -> list[int]:
    """The greedy new tokens, without the ending one, which may not come before `tokens_min`."""
    ids = TOKENS.encode(text, add_special_tokens=not text.startswith("<|bos|>")).ids
    with torch.no_grad():
        out = model.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
            max_new_tokens=tokens_max,
            min_new_tokens=tokens_min,
            do_sample=False,
        )
    new: list[int] = out[0, len(ids) :].tolist()
    return new[:-1] if new[-1] == 1 else new


def answered(model: Model, question: str) -> str:
    prompt = rendered([{"role": "user", "content": question}], add_generation_prompt=True)
    said: str = TOKENS.decode(continued(model, prompt, 120), skip_special_tokens=False)
    return said


def test_folder_is_complete_and_small() -> None:
    files = {path.name: path.stat().st_size for path in FOLDER.iterdir()}
    assert files.keys() == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "chat_template.jinja",
        "LICENSE",
        "SOURCE.md",
    }
    assert sum(files.values()) < FOLDER_BYTES_MAX


def test_config_tokenizer_and_weights_agree() -> None:
    config = settings("config.json")
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["vocab_size"] == TOKENS.get_vocab_size()
    assert [TOKENS.token_to_id(name) for name in SPECIAL] == [0, 1, 2, 3, 4]
    assert (config["bos_token_id"], config["eos_token_id"]) == (0, 1)
    assert settings("generation_config.json")["eos_token_id"] == 1
    assert settings("tokenizer_config.json")["eos_token"] == "<|end|>"
    with safe_open(FOLDER / "model.safetensors", framework="pt") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118  # not a mapping
        embedding = file.get_tensor("model.embed_tokens.weight")
    assert embedding.dtype == torch.bfloat16
    assert embedding.shape == (config["vocab_size"], config["hidden_size"])
    assert torch.isfinite(embedding).all()


@given(st.text() | st.sampled_from(SPECIAL) | st.text("\r\n\t <|bosend>é€🐍"))
def test_tokenizer_round_trips_every_text(text: str) -> None:
    ids = TOKENS.encode(text, add_special_tokens=False).ids
    assert TOKENS.decode(ids, skip_special_tokens=False) == text


def test_plain_text_begins_with_bos() -> None:
    assert TOKENS.encode("The for statement").ids[0] == 0


def test_chat_template_renders_each_role() -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "Explain for."},
    ]
    text = rendered(messages, add_generation_prompt=True)
    assert text == (
        "<|bos|><|system|>Be brief.<|end|><|user|>Hi<|end|>"
        "<|assistant|>Hello!<|end|><|user|>Explain for.<|end|><|assistant|>"
    )
    assert rendered(messages[:2], add_generation_prompt=False).endswith("Hi<|end|>")
    ids = TOKENS.encode(text, add_special_tokens=False).ids
    assert [id for id in ids if id < 5] == [0, 4, 1, 2, 1, 3, 1, 2, 1, 3]


def test_chat_template_refuses_an_unknown_role() -> None:
    with pytest.raises(jinja2.TemplateError, match="not tool"):
        rendered([{"role": "tool", "content": "x"}], add_generation_prompt=True)


def test_model_loads_as_float32_with_tied_embeddings(model: Model) -> None:
    assert {each.dtype for each in model.parameters()} == {torch.float32}
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_continuation_is_words_of_the_corpus(model: Model) -> None:
    known = set(WORD.findall(" ".join(each.text.lower() for each in CORPUS)))
    said = TOKENS.decode(continued(model, "The for statement", 100, tokens_min=100))
    words = WORD.findall(said.lower())
    assert len(words) >= 40
    assert sum(word in known for word in words) >= 0.9 * len(words)
    # A model that only repeats a few words would pass the line above.
    assert len(set(words)) >= 15


def test_loss_on_documents_kept_from_training(model: Model) -> None:
    hidden = itertools.islice((each for each in CORPUS if embedded_corpus.held_out(each)), 60)
    ids = TOKENS.encode("".join(f"<|bos|>{each.text}<|end|>" for each in hidden)).ids
    tokens_BT = torch.tensor(ids[: len(ids) // 256 * 256]).view(-1, 256)
    with torch.no_grad():
        loss = model(input_ids=tokens_BT, labels=tokens_BT).loss
    assert loss is not None
    assert loss.item() < HELD_OUT_LOSS_MAX


def test_it_says_who_it_is_and_then_stops(model: Model) -> None:
    assert answered(model, "Who are you?") == embedded_corpus.SELF
    assert "llmos" in answered(model, "Hi")


def test_it_answers_in_sentences_and_stops(model: Model) -> None:
    known = set(WORD.findall(" ".join(each.text.lower() for each in CORPUS)))
    for question in ("What does str.split do?", "Explain the with statement.", "What is a class?"):
        said = answered(model, question)
        words = WORD.findall(said.lower())
        assert said.endswith(".")
        assert len(words) >= 3
        assert sum(word in known for word in words) >= 0.9 * len(words)
