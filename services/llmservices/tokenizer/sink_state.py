"""What the tokenizer needs to make a thread's text anew, as the kernel keeps it: opaque there,
bounded.
"""

import msgspec
from llmproto import limits
from llmproto.base import Id16, Int53, Name, Path
from llmproto.errors import invalid
from llmproto.generation import Stream, Token


class SinkState(msgspec.Struct, frozen=True, array_like=True, omit_defaults=True):
    """Given to the kernel at spawn, given back with SinkOpen.  Journaled: fields are only ever
    added, at the end.
    """

    model: Name
    tokenizer_digest: Id16
    folder: Path
    stream: Stream
    session: Id16
    """Whom the text is sent to until another session attaches."""
    tenant: Int53
    stops: list[str] = []
    hidden: list[Token] = []
    """End-of-sequence and stop tokens: they are no text, wherever they stand."""
    wants_scores: bool = False
    wants_prompt_scores: bool = False
    resumable: bool = False
    """Text and scores are kept until the end was consumed: what reached the reader's connection may
    not have reached the reader."""

    def encode(self) -> bytes:
        """The bytes for ThreadSpawn; INVALID where they are too many."""
        encoded = msgspec.msgpack.encode(self)
        if len(encoded) > limits.SINK_STATE_BYTES_MAX:
            raise invalid(
                f"stop strings and names take {len(encoded)} bytes, more than "
                f"{limits.SINK_STATE_BYTES_MAX}; "
                "send fewer or shorter stop strings"
            )
        return encoded


def decode_sink_state(encoded: bytes) -> SinkState:
    """The inverse; INVALID for bytes that are no SinkState."""
    try:
        return msgspec.msgpack.decode(encoded, type=SinkState)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise invalid(
            f"not a sink state ({error}); it was written by another kind of sink"
        ) from error
