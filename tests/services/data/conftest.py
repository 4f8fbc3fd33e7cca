"""A small tokenizer, and a way to prepare data without a service."""

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from llmproto.data import Prepare
from llmproto.recipes import DataRecipe
from llmservices.data.cache import Cache
from llmservices.data.plans import Maker, Planned
from tokenizers import decoders, models, pre_tokenizers, processors

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<|bos|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]


def byte_tokenizer() -> tokenizers.Tokenizer:
    """A token for each byte, after five special ones; <|bos|> before each text."""
    tokens = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A",
        pair="<|bos|> $A <|end|> $B:1",
        special_tokens=[("<|bos|>", 0), ("<|end|>", 1)],
    )
    return tokenizer


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of byte_tokenizer, with a chat template."""
    folder = tmp_path_factory.mktemp("tokenizer")
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<|bos|>", "eos_token": "<|end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


class Bench:
    """Prepares in a cache of its own."""

    def __init__(self, root: Path, tokenizer: Path) -> None:
        self.root = root
        self.tokenizer = tokenizer
        self.cache = Cache(root / "cache", bytes_max=1 << 30)
        self.cache.open()
        self.maker = Maker(self.cache, set, lambda rows: None)

    def ask(self, recipe: DataRecipe, **fields: Any) -> Prepare:  # Any: fields of several types
        """A question with everything else at its simplest."""
        given = {
            "part": "train",
            "task": "generate",
            "tokenizer": str(self.tokenizer),
            "context_tokens": 64,
            "batch": 2,
            "seed": 0,
            **fields,
        }
        return Prepare(data=recipe, **given)

    def plan(self, recipe: DataRecipe, **fields: Any) -> Planned:  # Any: fields of several types
        """Its answer."""
        return self.maker.prepare(self.ask(recipe, **fields))

    def file(self, name: str, text: str) -> str:
        """Write a data file; gives its path."""
        path = self.root / name
        path.write_text(text)
        return str(path)

    def jsonl(self, name: str, *rows: object) -> str:
        """Write rows as JSON lines."""
        return self.file(name, "".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def bench(tmp_path: Path, tokenizer_folder: Path) -> Bench:
    return Bench(tmp_path, tokenizer_folder)
