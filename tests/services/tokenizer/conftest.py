"""Small vocabularies of every kind that the detokenizer knows, and the shared assets."""

from pathlib import Path

import pytest
import tokenizers
from llmservices.texts.tokenizer_config import TokenizerConfig
from llmservices.tokenizer.pieces import byte_alphabet
from llmservices.tokenizer.vocabulary import Vocabulary
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

ASSETS = Path(__file__).resolve().parents[4] / "shared" / "assets" / "models"
PLAIN = TokenizerConfig(named={}, special=(), extra=(), added={}, chat_template=None)


def byte_level() -> tokenizers.Tokenizer:
    """Every byte, a few merges, and added tokens inside and outside the byte alphabet."""
    alphabet = sorted(byte_alphabet())
    vocab = {token: index for index, token in enumerate(["<s>", "</s>", *alphabet])}
    merges = [("Ġ", "t"), ("h", "e"), ("Ã", "©"), ("Ġt", "he"), ("ð", "Ł")]
    for left, right in merges:
        vocab[left + right] = len(vocab)
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>", "<|end|>"])
    tokenizer.add_tokens(["<tool>", "two words", "日本", "é"])
    return tokenizer


def byte_fallback(*, strip: bool) -> tokenizers.Tokenizer:
    """As Llama 2 (with strip) and Gemma (without) spell it."""
    words = ["▁", "a", "b", "é", "▁a", "ab", "▁ab", "▁▁", "日", "�"]
    contents = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    vocab = {token: index for index, token in enumerate(contents)}
    merges = [("▁", "a"), ("a", "b"), ("▁", "ab"), ("▁", "▁")]
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocab=vocab, merges=merges, byte_fallback=True, unk_token="<unk>")
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if strip:
        steps.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


def word_piece() -> tokenizers.Tokenizer:
    """As BERT spells it."""
    contents = ["[UNK]", "[CLS]", "hello", "world", "##s", "##ing", ".", "it", "'", "s", "n't"]
    vocab = {token: index for index, token in enumerate(contents)}
    tokenizer = tokenizers.Tokenizer(models.WordPiece(vocab=vocab, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    tokenizer.add_special_tokens(["[UNK]", "[CLS]"])
    return tokenizer


def metaspace() -> tokenizers.Tokenizer:
    """As T5 spells it."""
    contents = ["<unk>", "▁", "a", "▁a", "▁b", "c", "▁▁d"]
    vocab = {token: index for index, token in enumerate(contents)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(["<unk>"])
    return tokenizer


def undecoded() -> tokenizers.Tokenizer:
    """Without a decoder: tokens joined by spaces."""
    contents = ["<unk>", "one", "two", "three"]
    vocab = {token: index for index, token in enumerate(contents)}
    return tokenizers.Tokenizer(models.WordLevel(vocab=vocab, unk_token="<unk>"))


@pytest.fixture(scope="session")
def vocabularies() -> dict[str, Vocabulary]:
    """By kind."""
    made = {
        "byte_level": byte_level(),
        "fallback": byte_fallback(strip=False),
        "fallback_strip": byte_fallback(strip=True),
        "word_piece": word_piece(),
        "metaspace": metaspace(),
        "undecoded": undecoded(),
    }
    return {
        name: Vocabulary(tokenizer, PLAIN, digest=bytes(16)) for name, tokenizer in made.items()
    }


@pytest.fixture(scope="session")
def stories() -> Path:
    """A whole small model, where it is there."""
    return _asset("stories260k-llama")


@pytest.fixture(scope="session")
def gpt2() -> Path:
    """A tokenizer of 50,257 tokens, where it is there."""
    return _asset("tokenizer-gpt2")


def _asset(name: str) -> Path:
    folder = ASSETS / name
    if not folder.is_dir():
        pytest.skip(f"{name} is not among the shared assets")
    return folder


@pytest.fixture(scope="session")
def byte_level_file() -> str:
    """The content of tokenizer.json for the small byte-level vocabulary."""
    return str(byte_level().to_str())


@pytest.fixture
def byte_level_tokenizer() -> tokenizers.Tokenizer:
    """A fresh one, to be changed."""
    return byte_level()


@pytest.fixture
def byte_level_vocabulary() -> Vocabulary:
    """With a chat template."""
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}{{ eos_token }}"
    named = {"bos_token": "<s>", "eos_token": "</s>"}
    config = TokenizerConfig(
        named=named, special=tuple(named.values()), extra=(), added={}, chat_template=template
    )
    return Vocabulary(byte_level(), config, digest=bytes(16))
