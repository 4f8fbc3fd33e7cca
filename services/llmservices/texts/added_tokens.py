"""Tokens beyond tokenizer.json, as `transformers` adds them when it loads a folder."""

import tokenizers

from llmservices.texts.tokenizer_config import TokenizerConfig


def add_tokens(tokenizer: tokenizers.Tokenizer, config: TokenizerConfig) -> None:
    """Tokens that tokenizer_config.json knows and tokenizer.json does not, in the order of their
    ids.
    """
    known = tokenizer.get_added_tokens_decoder()
    for id_, token in sorted(config.added.items()):
        if id_ not in known:
            made = tokenizers.AddedToken(
                token.content,
                single_word=token.single_word,
                lstrip=token.lstrip,
                rstrip=token.rstrip,
                normalized=token.normalized,
                special=token.special or token.content in config.special,
            )
            tokenizer.add_tokens([made])
    added = tokenizer.get_added_tokens_decoder().values()
    declared = {token.content for token in added}
    special = {token.content for token in added if token.special}
    missing = [content for content in config.special if content not in special]
    missing += [content for content in config.extra if content not in declared]
    tokenizer.add_special_tokens(
        [tokenizers.AddedToken(content, special=True, normalized=False) for content in missing]
    )
