"""An answer as server-sent events: chunks in the order of the rows, an id with each where the
client may resume."""

from collections.abc import Sequence
from typing import Final

import msgspec
from libllm.events import StreamRow
from llmproto.errors import RemoteError
from llmproto.generation import StreamEnd
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from llmservices.gateway.answers import ChatChunk, TextCompletion, Usage
from llmservices.gateway.errors import HttpError, of_remote
from llmservices.gateway.pieces import (
    Choice,
    Head,
    chat_chunk,
    chat_finish,
    chat_role,
    text_chunk,
    text_finish,
    usage,
)
from llmservices.gateway.reading import Reading, unless_gone
from llmservices.gateway.sse import DONE, WAITING, Mark, Stage, StreamName, event

WAITING_S: Final = 15.0

Chunk = ChatChunk | TextCompletion


class Part:
    """One choice on its way: its name, its text, how far the client is."""

    def __init__(self, name: StreamName, choice: Choice, mark: Mark | None = None) -> None:
        self.name = name
        self.choice = choice
        self.begun = mark is not None
        """The client has had the first chunk, which names the role."""
        self.mark = mark if mark is not None else Mark()


class Events:
    """Rows to events.

    Invariant: an event's id names everything up to and including that event, so that what follows
    it is all that is missing.
    """

    def __init__(
        self, head: Head, parts: Sequence[Part], *, with_ids: bool, prompt_tokens: int | None
    ) -> None:
        """`prompt_tokens` are those of all prompts; None: those that the stream's end tells."""
        first = parts[0].name
        self._chat = first.chat
        self._usage = first.usage
        self._head = head
        self._parts = {part.name.stream: part for part in parts}
        self._with_ids = with_ids
        self._prompt_tokens = prompt_tokens
        self._ends: list[StreamEnd] = []

    def begin(self) -> bytes:
        """What comes before the first row."""
        if not self._chat:
            return b""
        return b"".join(
            self._event(chat_role(self._head, part.name.index), part)
            for part in self._parts.values()
            if not part.begun
        )

    def row(self, row: StreamRow) -> bytes:
        """What one row adds; HttpError where it says that the stream broke off."""
        part = self._parts[row.stream]
        piece = part.choice.take(row)
        mark = part.mark
        part.mark = Mark(
            row.until,
            mark.scores + len(row.scores or ()),
            part.choice.characters,
            mark.stage,
        )
        data = b""
        if piece.text or piece.scores:
            chunk = chat_chunk(self._head, piece) if self._chat else text_chunk(self._head, piece)
            data = self._event(chunk, part)
        if piece.end is not None:
            self._ends.append(piece.end)
            if not part.mark.stage:
                done = (
                    chat_finish(self._head, piece) if self._chat else text_finish(self._head, piece)
                )
                data += self._event(done, part, stage="f")
        return data

    def finish(self) -> bytes:
        """What comes after the last row."""
        if not self._usage:
            return DONE
        prompt_tokens = self._prompt_tokens
        if prompt_tokens is None:
            prompt_tokens = self._ends[0].prompt_tokens
        told = usage(self._ends, prompt_tokens)
        only = next(iter(self._parts.values())) if len(self._parts) == 1 else None
        return self._event(self._usage_chunk(told), only, stage="u") + DONE

    def _usage_chunk(self, told: Usage) -> Chunk:
        head = self._head
        if self._chat:
            return ChatChunk(head.id, head.created, head.model, [], usage=told)
        return TextCompletion(head.id, head.created, head.model, [], usage=told)

    def _event(self, chunk: Chunk, part: Part | None, *, stage: Stage = "") -> bytes:
        if part is None or not self._with_ids:
            return event(msgspec.json.encode(chunk))
        if stage:
            part.mark = msgspec.structs.replace(part.mark, stage=stage)
        return event(msgspec.json.encode(chunk), part.mark.of(part.name))


class EventStream(Response):
    """Sends the events of a reading; a client that leaves ends it, unless it may resume."""

    def __init__(
        self,
        reading: Reading,
        events: Events,
        *,
        names: Sequence[StreamName],
    ) -> None:
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        if reading.resumable:
            headers["llmos-stream"] = ", ".join(map(str, names))
        super().__init__(None, headers=headers, media_type="text/event-stream")
        del self.headers["content-length"]
        self._reading = reading
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Everything, as fast as the client reads."""
        try:
            await unless_gone(receive, self._write(send))
        except HttpError:
            pass  # It is gone.
        finally:
            self._reading.close(cancel=not self._reading.resumable)

    async def _write(self, send: Send) -> None:
        await send(
            {
                "type": "http.response.start",
                "status": self.status_code,
                "headers": self.raw_headers,
            }
        )
        try:
            await _body(send, self._events.begin())
            while not self._reading.is_over:
                await self._write_rows(send)
            last = self._events.finish()
        except RemoteError as error:
            last = event(of_remote(error).json)
        except HttpError as error:
            last = event(error.json)
        await send({"type": "http.response.body", "body": last, "more_body": False})

    async def _write_rows(self, send: Send) -> None:
        """What has come by now; what came before a row that breaks off is sent all the same."""
        try:
            rows = await self._reading.take(patience_s=WAITING_S)
        except TimeoutError:
            await _body(send, WAITING)
            return
        data = []
        try:
            for row in rows:
                data.append(self._events.row(row))  # noqa: PERF401 - it may raise in between
        finally:
            await _body(send, b"".join(data))
        for row in rows:
            self._reading.consume(row)


class FinishedStream(Response):
    """What is left of a stream that the client has had all of."""

    media_type = "text/event-stream"

    def __init__(self) -> None:
        super().__init__(DONE, headers={"cache-control": "no-cache"})


async def _body(send: Send, data: bytes) -> None:
    """Waits while the client does not read."""
    if data:
        await send({"type": "http.response.body", "body": data, "more_body": True})
