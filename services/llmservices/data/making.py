"""Tokenizers made of training data: byte-level BPE, or one token a character.

Deterministic: the same texts give the same files.  Sources: Sennrich et al. 2016 (BPE), Radford et
al. 2019 (on bytes).
"""

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final

import tokenizers
from llmproto.data import TokenizerMade, TokenizerMake
from llmproto.errors import invalid
from llmproto.recipes import TokenizerRecipe
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from llmservices.data.cache import Cache, disk, sync
from llmservices.data.encoding import FILES, TOKENIZER, Encoder
from llmservices.data.examples import Source, examples
from llmservices.data.formats import texts_of
from llmservices.data.readers import files_of
from llmservices.data.rows import Tally
from llmservices.texts.tokenizer_config import CHAT_TEMPLATE, TOKENIZER_CONFIG

BOS: Final = "<|bos|>"
END: Final = "<|end|>"
UNKNOWN: Final = "<|unk|>"
BYTES: Final = 256


def make_tokenizer(ask: TokenizerMake, *, cache: Cache) -> TokenizerMade:
    """Make it and put it into the output folder, file by file, each whole."""
    with cache.making() as folder, disk():
        if ask.tokenizer.kind == "folder":
            _copy(ask.tokenizer, folder)
        else:
            _train(ask, folder)
        encoder = Encoder(folder)
        output = Path(ask.output)
        output.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            if (folder / name).exists():
                shutil.copyfile(folder / name, output / f".{name}.making")
                sync(output / f".{name}.making")
                os.replace(output / f".{name}.making", output / name)
            else:
                (output / name).unlink(missing_ok=True)
    return TokenizerMade(
        path=ask.output, vocabulary=encoder.vocabulary, bos=encoder.bos, end=encoder.end
    )


def _copy(recipe: TokenizerRecipe, folder: Path) -> None:
    if recipe.path is None:
        raise invalid('a tokenizer of the kind "folder" needs the folder: name it as path')
    for name in FILES:
        source = Path(recipe.path) / name
        if source.is_file():
            shutil.copyfile(source, folder / name)
    if not (folder / TOKENIZER).exists():
        raise invalid(f"{Path(recipe.path) / TOKENIZER}: is missing; name a tokenizer's folder")
    if recipe.chat_template is not None:
        (folder / CHAT_TEMPLATE).write_text(recipe.chat_template, encoding="utf-8")


def _train(ask: TokenizerMake, folder: Path) -> None:
    recipe = ask.tokenizer
    special = [BOS, END, *recipe.special]
    if len(set(special)) < len(special):
        raise invalid(f"special tokens are named twice: {', '.join(special)}")
    settings: dict[str, object] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": END,
        "pad_token": END,
        "clean_up_tokenization_spaces": False,
    }
    if recipe.kind == "bpe":
        tokenizer = byte_bpe(_texts(ask), recipe.vocabulary, special)
    else:
        tokenizer = characters(_texts(ask), special)
        settings["unk_token"] = UNKNOWN
    tokenizer.save(str(folder / TOKENIZER))
    content = json.dumps(settings, indent=2, sort_keys=True) + "\n"
    (folder / TOKENIZER_CONFIG).write_text(content, encoding="utf-8")
    if recipe.chat_template is not None:
        (folder / CHAT_TEMPLATE).write_text(recipe.chat_template, encoding="utf-8")


def _texts(ask: TokenizerMake) -> Iterator[str]:
    """The training texts."""
    recipe = ask.data
    if not recipe.train:
        raise invalid("the recipe names no train data to make a tokenizer of")
    keep: Any = "train" if recipe.validation_share and not recipe.validation else "all"
    source = Source(files=tuple(files_of(recipe.train, part="train")), recipe=recipe, keep=keep)
    for found in examples(source, Tally(), lambda shape: None):
        yield from texts_of(found.example)


def byte_bpe(texts: Iterable[str], vocabulary: int, special: list[str]) -> Any:  # untyped library
    """Every byte has a token, so every text has tokens; <|bos|> stands before each."""
    least = BYTES + len(special)
    if vocabulary < least:
        raise invalid(
            f"a vocabulary of {vocabulary} tokens is too small: {len(special)} special ones and "
            f"{BYTES} bytes are {least}"
        )
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, special.index(BOS))]
    )
    return tokenizer


def characters(texts: Iterable[str], special: list[str]) -> Any:  # untyped library
    """A token for each character of the texts, and one for all others; nothing is put around a
    text, because windows of it begin anywhere."""
    found: set[str] = set()
    for text in texts:
        found.update(text)
    tokens = [*special, UNKNOWN, *sorted(found)]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    model = models.BPE(vocab=vocabulary, merges=[], unk_token=UNKNOWN, fuse_unk=False)
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([*special, UNKNOWN])
    return tokenizer
