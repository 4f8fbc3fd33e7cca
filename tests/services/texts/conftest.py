"""A small byte-level tokenizer, as a file's content."""

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers


@pytest.fixture(scope="session")
def byte_level_file() -> str:
    """The content of a tokenizer.json."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate(["<s>", "</s>", *alphabet])}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return str(tokenizer.to_str())
