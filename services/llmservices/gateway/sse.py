"""Server-sent events, and the names by which a client resumes a stream.

A name and an event's id hold everything that is needed to go on in the same format: no gateway has
to remember anything.
Source: the HTML standard, "Server-sent events" (event stream format, Last-Event-ID).
"""

import re
from typing import Final, Literal

import msgspec

from llmservices.gateway.errors import HttpError

DONE: Final = b"data: [DONE]\n\n"
WAITING: Final = b": waiting\n\n"
"""A comment: keeps proxies from giving up, and shows when the client is gone."""

Stage = Literal["", "f", "u"]
"""What was sent beyond the text: nothing, the finish reason, the usage too."""

_NAME: Final = r"([0-9a-f]{34})(?:-([ct])(u?)(l?)-(\d{1,7})-(\d{1,4})-(\d{1,12}))?"
_NAME_RE: Final = re.compile(_NAME)
_ID_RE: Final = re.compile(rf"{_NAME}:(\d{{1,15}}):(\d{{1,15}}):(\d{{1,15}})(?::([fu]))?")


class StreamName(msgspec.Struct, frozen=True):
    """A stream as HTTP knows it.  Text: `HEX-cul-INDEX-PROMPT-CREATED`, or HEX alone."""

    stream: bytes
    chat: bool = False
    usage: bool = False
    """The usage comes last."""
    scored: bool = True
    """Log-probabilities are shown, where there are any."""
    index: int = 0
    """Of the choice in the answer."""
    prompt: int = 0
    """Which prompt of the request it continues: its key is so much above the request's."""
    created_s: int = 0

    def __str__(self) -> str:
        letters = ("c" if self.chat else "t") + "u" * self.usage + "l" * self.scored
        return f"{self.stream.hex()}-{letters}-{self.index}-{self.prompt}-{self.created_s}"

    @property
    def completion(self) -> str:
        """Id of the answer, the same for all its choices."""
        return completion_id(moved(self.stream[:16], -self.prompt), chat=self.chat)


class Mark(msgspec.Struct, frozen=True):
    """How far a client is in a stream.  Text: `NAME:OFFSET:SCORES:CHARACTERS`, then the stage."""

    offset: int = 0
    """UTF-8 bytes."""
    scores: int = 0
    """Scored tokens."""
    characters: int = 0
    """Of the choice's text, the prompt's included where that is shown."""
    stage: Stage = ""

    def of(self, name: StreamName) -> str:
        """The event's id."""
        stage = f":{self.stage}" if self.stage else ""
        return f"{name}:{self.offset}:{self.scores}:{self.characters}{stage}"


def completion_id(key: bytes, *, chat: bool) -> str:
    """What OpenAI calls the id of an answer."""
    return ("chatcmpl-" if chat else "cmpl-") + key.hex()


def moved(key: bytes, by: int) -> bytes:
    """The key of another prompt of the same request."""
    return ((int.from_bytes(key, "big") + by) % (1 << 128)).to_bytes(16, "big")


def read_name(text: str) -> StreamName:
    """The inverse of str(); HttpError(404) for what is none."""
    found = _NAME_RE.fullmatch(text)
    if found is None:
        raise HttpError(
            404, f"{text[:128]!r} is no stream: take it from the Llmos-Stream header", param="id"
        )
    return _name(found)


def read_id(text: str) -> tuple[StreamName, Mark]:
    """The inverse of Mark.of; HttpError(400) for what is none."""
    found = _ID_RE.fullmatch(text)
    if found is None:
        raise HttpError(
            400,
            f"Last-Event-ID {text[:128]!r} is no id of an event of this stream: send it back as it "
            "came, or leave it out to read from the beginning",
            param="Last-Event-ID",
        )
    stage: Stage = "f" if found[11] == "f" else "u" if found[11] == "u" else ""
    return _name(found), Mark(int(found[8]), int(found[9]), int(found[10]), stage)


def event(data: bytes, event_id: str = "") -> bytes:
    """One event; JSON has no line breaks of its own."""
    if event_id:
        return b"id: " + event_id.encode() + b"\ndata: " + data + b"\n\n"
    return b"data: " + data + b"\n\n"


def _name(found: "re.Match[str]") -> StreamName:
    stream = bytes.fromhex(found[1])
    if found[2] is None:
        return StreamName(stream)
    return StreamName(
        stream,
        chat=found[2] == "c",
        usage=found[3] == "u",
        scored=found[4] == "l",
        index=int(found[5]),
        prompt=int(found[6]),
        created_s=int(found[7]),
    )
