"""What a row is on its way from a file to tokens, and the count of what happened to rows.

Nothing here reads or writes; every later stage is a function of these values.
"""

from collections import Counter
from typing import Final, NamedTuple

import msgspec
from llmproto import limits
from llmproto.errors import RemoteError, invalid

Values = dict[str, object]
"""A row as its file holds it: columns by name."""
DETAIL_CHARACTERS: Final = 300


class Place(NamedTuple):
    """Where a row stands."""

    file: str
    line: int
    """Of the file; of formats without lines: the row's number.  From 1."""

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


class Raw(NamedTuple):
    """One row as it was read."""

    place: Place
    values: Values


class Bad(NamedTuple):
    """One that could not be."""

    place: Place
    why: str

    def __str__(self) -> str:
        return f"{self.place}: {self.why}"[:DETAIL_CHARACTERS]


class BadRow(Exception):
    """This row is not what its format says; the message tells why."""


class Text(msgspec.Struct, frozen=True):
    """Plain text: everything is learned."""

    text: str


class Turn(NamedTuple):
    """One message of a chat."""

    role: str
    content: str


class Chat(msgspec.Struct, frozen=True):
    """A conversation: the assistant's turns are learned."""

    turns: tuple[Turn, ...]


class Completion(msgspec.Struct, frozen=True):
    """A prompt and what is learned to follow it."""

    prompt: str
    completion: str
    input: str = ""
    """What the prompt is about, where that is a column of its own."""
    instruction: bool = False
    """The prompt is what a user would say: a chat of one turn, where the model has chats."""

    @property
    def asked(self) -> str:
        """All that comes before the completion."""
        return f"{self.prompt}\n\n{self.input}" if self.input else self.prompt


class Labelled(msgspec.Struct, frozen=True):
    """One text, or two, and what is to be said of it."""

    text: str
    pair: str | None = None
    label: str | None = None
    value: float | None = None


Example = Text | Chat | Completion | Labelled


class Tally:
    """What happened to the rows, by reason; the first malformed ones in words.

    Invariant: rows that are `bad`, or have an unknown label, are passed over only where `skip` says
    so: otherwise the first of them is the end.
    """

    def __init__(self) -> None:
        self.read = 0
        self.dropped: Counter[str] = Counter()
        self.changed: Counter[str] = Counter()
        self.bad: list[str] = []

    def take_bad(self, bad: Bad, *, skip: bool) -> None:
        """A malformed row; INVALID with its place unless such rows are skipped."""
        if not skip:
            raise malformed(bad)
        self.dropped["malformed"] += 1
        if len(self.bad) < limits.DATA_PROBLEMS_MAX:
            self.bad.append(str(bad))


def malformed(bad: Bad) -> RemoteError:
    """The refusal of data with a malformed row."""
    return invalid(f'{bad}; correct it, or set bad_rows = "skip" to leave such rows out')
