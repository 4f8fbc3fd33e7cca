"""What people call a version: `name`, `name:tag`, `name@digest`, `@digest`."""

import re
from typing import Final

import msgspec
from llmproto.errors import invalid

NAME_CHARACTERS_MAX: Final = 128
DIGITS_MIN: Final = 4

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]*")
_TAG: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_DIGITS: Final = re.compile(r"[0-9a-f]{4,64}")


class Parsed(msgspec.Struct, frozen=True):
    """A reference, taken apart; of tag and digits at most one is there."""

    name: str | None
    tag: str | None = None
    digits: str | None = None
    """The beginning of a digest."""


def parse(reference: str) -> Parsed:
    """INVALID for what is no reference."""
    name, at, digits = reference.partition("@")
    if at:
        digits = digits.lower()
        if not _DIGITS.fullmatch(digits):
            raise invalid(
                f"reference {reference!r}: a digest is {DIGITS_MIN} to 64 hexadecimal digits"
            )
        return Parsed(check_name(name) if name else None, digits=digits)
    name, colon, tag = reference.partition(":")
    if not colon:
        return Parsed(check_name(name))
    if not _TAG.fullmatch(tag):
        raise invalid(f"reference {reference!r}: {tag!r} is no tag")
    return Parsed(check_name(name), tag=tag)


def check_name(name: str) -> str:
    """The name of a version; INVALID for one that cannot stand in a reference."""
    if not _NAME.fullmatch(name) or len(name) > NAME_CHARACTERS_MAX or ".." in name:
        raise invalid(
            f"name {name!r}: want a letter or digit, then letters, digits and . _ / - "
            f"(at most {NAME_CHARACTERS_MAX})"
        )
    return name


def short(name: str, digest: bytes, digits: int = 8) -> str:
    """`name@digest`, cut."""
    return f"{name}@{digest.hex()[:digits]}"
