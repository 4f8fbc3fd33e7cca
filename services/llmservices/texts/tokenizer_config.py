"""What tokenizer_config.json and its neighbours say: the named special tokens and the chat
template.
"""

from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec
from llmproto.errors import invalid

TOKENIZER_CONFIG: Final = "tokenizer_config.json"
SPECIAL_TOKENS: Final = "special_tokens_map.json"
CHAT_TEMPLATE: Final = "chat_template.jinja"

T = TypeVar("T")


class AddedToken(msgspec.Struct, frozen=True):
    """A token of the vocabulary that is matched in the text before anything else."""

    content: str
    special: bool = False
    normalized: bool = True
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False


class NamedTemplate(msgspec.Struct, frozen=True):
    """One of several chat templates."""

    name: str
    template: str


class ConfigFile(msgspec.Struct):
    """The fields of tokenizer_config.json with a fixed name."""

    chat_template: str | list[NamedTemplate] | None = None
    added_tokens_decoder: dict[str, AddedToken] = {}
    additional_special_tokens: list[str | AddedToken] | None = None
    extra_special_tokens: list[str | AddedToken] | dict[str, str | AddedToken] | None = None


class TokenizerConfig(msgspec.Struct, frozen=True):
    """Both files together."""

    named: dict[str, str]
    """`bos_token` and the like, as a chat template sees them."""
    special: tuple[str, ...]
    """Tokens hidden from output, besides those that tokenizer.json declares."""
    extra: tuple[str, ...]
    """Tokens that are special too where tokenizer.json does not declare them otherwise."""
    added: dict[int, AddedToken]
    """By id, where the file gives them."""
    chat_template: str | None
    template_names: tuple[str, ...] = ()
    """Of several templates: their names; `chat_template` is the one named `default`."""


def decode_file(path: Path, content: bytes, type_: type[T]) -> T:
    """A JSON file as a struct; INVALID, with the file's name, where it is not one."""
    try:
        return msgspec.json.decode(content, type=type_, strict=False)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise invalid(f"{path}: is broken ({error}); fetch it again or correct it") from error


def read_tokenizer_config(folder: Path, small: dict[str, bytes]) -> TokenizerConfig:
    """From the contents of the folder's small files; those that are not there say nothing."""
    path = folder / TOKENIZER_CONFIG
    content = small.get(TOKENIZER_CONFIG, b"{}")
    file = decode_file(path, content, ConfigFile)
    values = decode_file(path, content, dict[str, Any])  # Any: fields of every type
    if (
        not file.added_tokens_decoder
    ):  # folders of older versions name the tokens in a file of their own
        legacy = decode_file(
            folder / SPECIAL_TOKENS, small.get(SPECIAL_TOKENS, b"{}"), dict[str, Any]
        )
        values = {**legacy, **values}
    named = {
        name: text
        for name, value in values.items()
        if name.endswith("_token") and (text := _content(value)) is not None
    }
    extra = file.extra_special_tokens or file.additional_special_tokens or []
    if isinstance(extra, dict):
        named |= {name: _text(token) for name, token in extra.items()}
        extra = []
    declared = [token.content for token in file.added_tokens_decoder.values() if token.special]
    template, names = _template(folder, small, file)
    return TokenizerConfig(
        named=named,
        special=tuple(dict.fromkeys([*named.values(), *declared])),
        extra=tuple(map(_text, extra)),
        added={
            int(id_): token for id_, token in file.added_tokens_decoder.items() if id_.isdecimal()
        },
        chat_template=template,
        template_names=names,
    )


def _template(
    folder: Path, small: dict[str, bytes], file: ConfigFile
) -> tuple[str | None, tuple[str, ...]]:
    """The template in force, and the names where there are several.  Its own file goes first."""
    if CHAT_TEMPLATE in small:
        try:
            return small[CHAT_TEMPLATE].decode(), ()
        except UnicodeDecodeError as error:
            raise invalid(
                f"{folder / CHAT_TEMPLATE}: is not UTF-8 ({error}); fetch it again"
            ) from error
    if not isinstance(file.chat_template, list):
        return file.chat_template, ()
    templates = {template.name: template.template for template in file.chat_template}
    return templates.get("default"), tuple(templates)


def _content(value: object) -> str | None:
    """The text of a token that stands as a string or as an object; None for anything else."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _text(token: str | AddedToken) -> str:
    return token if isinstance(token, str) else token.content
