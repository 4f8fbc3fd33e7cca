"""What each token id adds to the text, as a table, for the two kinds of vocabulary that nearly
every model has.

*Byte-level*: a token stands for bytes, spelled in a printable alphabet (Radford et al. 2019,
section 2.2); the text is the UTF-8 of all bytes together.  *Byte-fallback*: a token is text in
which one character stands for the space, or `<0xNN>`, one byte of a character that the vocabulary
lacks (Kudo and Richardson 2018, as Llama uses it).
"""

import json
import re
from typing import Any, Final

import msgspec

REPLACEMENT: Final = "\ufffd"
BYTE_TOKEN: Final = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Pieces(msgspec.Struct, frozen=True):
    """Invariant: `texts[i]` is None exactly where `raws` has i, and then the bytes are not whole
    characters.
    """

    texts: list[str | None]
    """By id; empty for ids that are hidden or unknown."""
    raws: dict[int, bytes]
    """Of the ids that are part of a character."""
    per_byte: bool
    """Broken UTF-8 becomes one U+FFFD a byte (byte-fallback), not one a maximal broken part (byte-
    level).
    """
    strip_left: int = 0
    """Spaces that the whole text loses at its beginning."""


class Spelling(msgspec.Struct, frozen=True):
    """How a decoder reads tokens, where it is one that a table can stand for."""

    byte_level: bool
    replacements: tuple[tuple[str, str], ...] = ()
    strip_left: int = 0


def pieces_of(decoder: bytes, contents: list[str | None]) -> Pieces | None:
    """The table for a decoder (its JSON) and the visible tokens by id; None for any other kind of
    decoder.
    """
    spelling = _spelling(json.loads(decoder))
    if spelling is None:
        return None
    texts: list[str | None] = []
    raws: dict[int, bytes] = {}
    spelled = _byte_level if spelling.byte_level else _byte_fallback
    for id_, content in enumerate(contents):
        piece = spelled(content, spelling) if content else b""
        try:
            texts.append(piece.decode())
        except UnicodeDecodeError:
            texts.append(None)
            raws[id_] = piece
    return Pieces(
        texts=texts, raws=raws, per_byte=not spelling.byte_level, strip_left=spelling.strip_left
    )


def byte_alphabet() -> dict[str, int]:
    """The character that stands for each byte: itself where printable, else the next unused one
    from U+0100.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in set(printable)]
    return alphabet | {chr(0x100 + index): byte for index, byte in enumerate(others)}


ALPHABET: Final = byte_alphabet()


def _byte_level(content: str, _: Spelling) -> bytes:
    """The bytes that the characters stand for; a token with a character outside the alphabet is
    plain text.
    """
    try:
        return bytes([ALPHABET[character] for character in content])
    except KeyError:
        return content.encode()


def _byte_fallback(content: str, spelling: Spelling) -> bytes:
    for old, new in spelling.replacements:
        content = content.replace(old, new)
    if match := BYTE_TOKEN.fullmatch(content):
        return bytes([int(match[1], 16)])
    return content.encode()


def _spelling(decoder: dict[str, Any] | None) -> Spelling | None:  # Any: JSON of many shapes
    """Recognise exactly ByteLevel, Fuse*; or Replace*, ByteFallback, Fuse and at most one Strip."""
    steps = _flat(decoder)
    if steps and steps[0]["type"] == "ByteLevel" and all(s["type"] == "Fuse" for s in steps[1:]):
        return Spelling(byte_level=True)
    replacements: list[tuple[str, str]] = []
    while steps and steps[0]["type"] == "Replace" and "String" in steps[0]["pattern"]:
        step = steps.pop(0)
        replacements.append((step["pattern"]["String"], step["content"]))
    if [step["type"] for step in steps[:2]] != ["ByteFallback", "Fuse"]:
        return None
    rest, strip_left = steps[2:], 0
    if rest and rest[0]["type"] == "Strip" and rest[0]["content"] == " " and rest[0]["stop"] == 0:
        strip_left = rest.pop(0)["start"]
    return (
        None
        if rest
        else Spelling(byte_level=False, replacements=tuple(replacements), strip_left=strip_left)
    )


def _flat(decoder: dict[str, Any] | None) -> list[dict[str, Any]]:  # Any: JSON of many shapes
    if decoder is None:
        return []
    if decoder["type"] == "Sequence":
        return [step for inner in decoder["decoders"] for step in _flat(inner)]
    return [decoder]
