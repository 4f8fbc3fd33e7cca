"""Augmentation: changed copies of a row, word by word.  Pure.

Source: EDA, Wei and Zou 2019 (arXiv 1901.11196): random deletion, swap, insertion of synonyms,
replacement by synonyms.  What a copy looks like depends on the seed, the row's number and the
copy's number, on nothing else.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Final

from llmproto.errors import invalid
from llmproto.recipes import AugmentOptions

from llmservices.data.rows import Chat, Completion, Example, Labelled, Text, Turn

SYNONYM_BYTES_MAX: Final = 256 << 20

Synonyms = Mapping[str, Sequence[str]]


def copies(
    example: Example, options: AugmentOptions, synonyms: Synonyms, *, row: int
) -> list[Example]:
    """Changed copies of a row; those that came out as it was are left out."""
    made: list[Example] = []
    for copy in range(options.copies):
        draw = random.Random(f"{options.seed}/{row}/{copy}").random
        change = partial(augmented, options=options, synonyms=synonyms, draw=draw)
        changed = _changed(example, change)
        if changed != example and changed not in made:
            made.append(changed)
    return made


def augmented(
    text: str, options: AugmentOptions, synonyms: Synonyms, draw: Callable[[], float]
) -> str:
    """The text with some words changed; at least one word stays.

    `draw` gives numbers in 0 <= x < 1.
    """
    words = text.split()
    if not words:
        return text

    def below(count: int) -> int:
        return int(draw() * count)

    def times(share: float) -> int:
        return int(share * len(words) + draw()) if share > 0.0 else 0

    for _ in range(times(options.replace)):
        known = [place for place, word in enumerate(words) if _bare(word) in synonyms]
        if known:
            place = known[below(len(known))]
            words[place] = _synonym(words[place], synonyms, below)
    for _ in range(times(options.insert)):
        known = [place for place, word in enumerate(words) if _bare(word) in synonyms]
        if known:
            word = _synonym(words[known[below(len(known))]], synonyms, below)
            words.insert(below(len(words) + 1), word)
    for _ in range(times(options.swap)):
        one, other = below(len(words)), below(len(words))
        words[one], words[other] = words[other], words[one]
    if options.delete > 0.0:
        kept = [word for word in words if draw() >= options.delete]
        words = kept or [words[below(len(words))]]
    return " ".join(words)


def read_synonyms(path: Path | None) -> Synonyms:
    """Lines `word: synonym, synonym`; INVALID with file and line where one is not."""
    if path is None:
        return {}
    try:
        if path.stat().st_size > SYNONYM_BYTES_MAX:
            raise invalid(f"{path}: has more than {SYNONYM_BYTES_MAX} bytes")
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise invalid(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise invalid(f"{path}: is not UTF-8 ({error})") from None
    found: dict[str, list[str]] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        word, colon, rest = line.partition(":")
        synonyms = [synonym.strip() for synonym in rest.split(",") if synonym.strip()]
        if not colon or not word.strip() or not synonyms:
            raise invalid(f"{path}:{number}: is no line `word: synonym, synonym`")
        found.setdefault(word.strip().lower(), []).extend(synonyms)
    return found


def check_options(options: AugmentOptions) -> None:
    """INVALID for a wish that nothing can fulfil."""
    if (options.insert > 0.0 or options.replace > 0.0) and options.synonyms is None:
        raise invalid("insert and replace take their words from a file: name it as synonyms")


def _changed(example: Example, change: Callable[[str], str]) -> Example:
    """What is said to the model is changed; what it is to say is kept."""
    match example:
        case Text():
            return Text(change(example.text))
        case Labelled():
            pair = None if example.pair is None else change(example.pair)
            return Labelled(change(example.text), pair, example.label, example.value)
        case Completion():
            asked = change(example.prompt), change(example.input)
            return Completion(asked[0], example.completion, asked[1], example.instruction)
        case Chat():
            return Chat(
                tuple(
                    Turn(turn.role, change(turn.content)) if turn.role == "user" else turn
                    for turn in example.turns
                )
            )


def _bare(word: str) -> str:
    return word.strip(".,;:!?\"'()[]").lower()


def _synonym(word: str, synonyms: Synonyms, below: Callable[[int], int]) -> str:
    """One of the word's, with the punctuation around it."""
    bare = word.strip(".,;:!?\"'()[]")
    choices = synonyms[bare.lower()]
    chosen = choices[below(len(choices))]
    return word.replace(bare, chosen.capitalize() if bare[:1].isupper() else chosen, 1)
