"""Message kinds of plug-in services: each service has its own table, which its askers share.

    class Ask(Message, frozen=True):
        '''Client -> echo.  Answered by Said.'''

        text: str

    class Said(Message, frozen=True):
        '''Echo -> client.'''

        text: str

    KINDS = Kinds({0x8000: Ask, 0x8001: Said})

    said = await client.call("echo", Ask("hello"), Said, kinds=KINDS)

The bus carries their bodies without looking inside, and so do the kernel and the session of a peer.
"""

from collections.abc import Mapping
from typing import Final

import msgspec
from llmproto.base import Message, Opaque
from llmproto.errors import invalid
from llmproto.kinds import PLUGIN_KIND_FIRST

KIND_LAST: Final = 0xFFFF
_DETAIL_CHARACTERS_MAX: Final = 400
_encoder: Final = msgspec.msgpack.Encoder()


class Kinds:
    """One service's table: its numbers, which nobody else's meaning is bound to, and messages.

    Invariant: one to one, and no number is one of the protocol's own.
    """

    def __init__(self, table: Mapping[int, type[Message]]) -> None:
        """AssertionError where the table breaks the invariant: it stands in the author's code."""
        self._of = {message: kind for kind, message in table.items()}
        assert len(self._of) == len(table), "a message stands under two kinds"
        for kind in table:
            assert PLUGIN_KIND_FIRST <= kind <= KIND_LAST, f"kind 0x{kind:04x} is not a plug-in's"
        self._decoders = {kind: msgspec.msgpack.Decoder(message) for kind, message in table.items()}

    def pack(self, message: Message) -> Message:
        """What goes on the bus: one of its own encoded, any other as it is."""
        kind = self._of.get(type(message))
        return message if kind is None else Opaque(kind, _encoder.encode(message))

    def unpack(self, message: Message) -> Message:
        """The inverse; RemoteError(INVALID) for what is not in the table, or does not fit it."""
        if not isinstance(message, Opaque):
            return message
        decoder = self._decoders.get(message.kind)
        if decoder is None:
            raise invalid(f"kind 0x{message.kind:04x} is not known to this service")
        try:
            return decoder.decode(message.body)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            detail = f"kind 0x{message.kind:04x}: {error}"
            raise invalid(detail[:_DETAIL_CHARACTERS_MAX]) from None


NO_KINDS: Final = Kinds({})
"""Of whoever speaks the protocol's own messages alone."""
