"""Cleaning: what becomes of the texts of one row.  Pure; duplicates stand in `duplicates`.

The order is fixed: repair, normalise, control characters, masks; then the filters judge what is
left.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import Final, NamedTuple

import ftfy
from llmproto.recipes import CleanOptions

LIBRARIES: Final = (f"ftfy {ftfy.__version__}", f"unicode {unicodedata.unidata_version}")
"""What the same text may become something else by."""
CONTROL: Final = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufeff]")
"""Unicode's category Cc but for tab and newline, and the byte order mark."""
RETURNS: Final = re.compile("\r\n?")
GRAM_WORDS: Final = 3
MASKS: Final[dict[str, tuple[re.Pattern[str], ...]]] = {
    "email": (re.compile(r"\b[\w.+-]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63}){1,8}\b"),),
    # 7 to 15 digits (ITU E.164): international, with an area in parentheses, or 3-3-4; a range of
    # years, a version or an address of a machine is none
    "phone": (
        re.compile(r"(?<!\w)\+\d{1,3}(?:[ .-]?(?:\(\d{1,5}\)|\d{1,12})){1,6}(?!\w)"),
        re.compile(r"(?<!\w)\(\d{2,5}\)[ .-]?\d{2,4}(?:[ .-]?\d{2,4}){1,3}(?!\w)"),
        re.compile(r"(?<![\w.-])\d{3}[ .-]\d{3,4}[ .-]\d{4}(?![\w-])"),
    ),
    # words that secrets begin with by their makers' custom, and private keys
    "key": (
        re.compile(r"\b(?:sk|pk|rk)[-_](?:[A-Za-z0-9]+[-_])*[A-Za-z0-9]{16,}\b"),
        re.compile(r"\b(?:gh[pousr]_|github_pat_|glpat-|xox[abprs]-|hf_)[A-Za-z0-9_-]{16,}"),
        re.compile(r"\bA(?:KIA|SIA)[A-Z0-9]{16}\b"),
        re.compile(r"\bAIza[A-Za-z0-9_-]{35}"),
        re.compile(r"\beyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}"),
        re.compile(
            r"-----BEGIN [A-Z ]{0,30}PRIVATE KEY-----.*?-----END [A-Z ]{0,30}PRIVATE KEY-----",
            re.DOTALL,
        ),
    ),
}
PHONE_DIGITS: Final = range(7, 16)


class Cleaned(NamedTuple):
    """What became of a row."""

    texts: list[str]
    changes: list[str]
    """What was done to it."""
    dropped: str | None
    """Why it is left out."""


def clean(texts: Sequence[str], options: CleanOptions) -> Cleaned:
    """The texts of one row, cleaned and judged."""
    changes: dict[str, None] = {}
    done = [_clean_text(text, options, changes) for text in texts]
    return Cleaned(done, list(changes), _verdict("\n".join(done), options))


def _clean_text(text: str, options: CleanOptions, changes: dict[str, None]) -> str:
    def changed(new: str, what: str) -> str:
        if new != text:
            changes[what] = None
        return new

    if options.repair and not text.isascii():  # what is ASCII was decoded as it was meant
        text = changed(ftfy.fix_encoding(text), "repaired")
    if options.normalize != "none" and not text.isascii():
        text = changed(unicodedata.normalize(options.normalize, text), "normalized")
    if options.control_characters:
        text = changed(CONTROL.sub("", RETURNS.sub("\n", text)), "control_characters")
    for mask in options.mask:
        text = changed(masked(text, mask), f"masked_{mask}")
    return text


def masked(text: str, what: str) -> str:
    """With <email>, <phone> or <key> in place of what looks like one."""
    for pattern in MASKS[what]:
        text = pattern.sub(lambda found: _mask(found.group(), what), text)
    return text


def _mask(found: str, what: str) -> str:
    if what == "phone" and sum(map(str.isdigit, found)) not in PHONE_DIGITS:
        return found
    return f"<{what}>"


def _verdict(text: str, options: CleanOptions) -> str | None:
    characters = len(text.strip())
    if characters < options.characters_min:
        return "too_few_characters"
    if options.characters_max is not None and characters > options.characters_max:
        return "too_many_characters"
    if options.letters_share_min > 0.0 and letters_share(text) < options.letters_share_min:
        return "few_letters"
    if options.repetition_max < 1.0 and repetition(text) > options.repetition_max:
        return "repetitive"
    return None


def letters_share(text: str) -> float:
    """Share of characters that are letters or white space."""
    if not text:
        return 0.0
    return sum(character.isalpha() or character.isspace() for character in text) / len(text)


def repetition(text: str) -> float:
    """Share of the most frequent run of GRAM_WORDS words among all such runs; 0 where there are too
    few to tell."""
    words = text.split()
    grams = Counter(zip(*(words[start:] for start in range(GRAM_WORDS))))
    total = len(words) - GRAM_WORDS + 1
    return 0.0 if total <= 1 else max(grams.values()) / total
