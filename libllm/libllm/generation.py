"""One request's streams in the hands of their reader."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from types import TracebackType

from llmproto.base import Message
from llmproto.connection import Failed
from llmproto.errors import ErrorKind, RemoteError
from llmproto.generation import Accepted, Attached, Generate

from libllm.events import Close, Consumed, Open, Resume, StreamFailed, StreamRow
from libllm.listening import stream_id
from libllm.port import Port
from libllm.results import Completion, Gathering, Piece, Usage, completion


class Generation(AsyncIterator[Piece]):
    """The pieces of all choices, as they come; ends after the last piece of each.

    What was not read holds up its own threads and nothing else. Reading raises RemoteError where a
    choice fails. Leaving early (`aclose`, or the end of an `async with`) cancels what is
    unfinished; `detach` lets it go on.

    Invariant: rows are acknowledged only after the reader came back for more.
    """

    def __init__(self, port: Port, streams: Sequence[bytes], *, offset: int = 0) -> None:
        """Listens; `open_generation` and `resume_generation` make one that was also asked for."""
        self.streams = tuple(streams)
        """Their ids, by choice."""
        self.threads: tuple[bytes, ...] = ()
        """Their threads, once accepted."""
        self.accepted: Accepted | None = None
        self.model = ""
        """The resolved name, once accepted."""
        self._port = port
        self._open = dict.fromkeys(streams, offset)
        """Streams whose end was not handed out, and how many bytes were."""
        self._rows: list[StreamRow] = []
        self._handed: list[StreamRow] = []
        self._pieces: list[Piece] = []
        self._failure: RemoteError | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._call: int | None = None
        self._is_accepted = False
        for stream in streams:
            port.listen(stream, self)

    # --- what the session tells ----------------------------------------------------------------

    def row(self, row: StreamRow) -> None:
        """The next text of one of the streams."""
        self._rows.append(row)
        self._wake()

    def failed(self, failure: StreamFailed) -> None:
        """One of the streams brings no more."""
        self._fail(RemoteError(failure.kind, failure.detail))

    def answered(self, message: Message) -> None:
        """The request was accepted or refused."""
        self._call = None
        if isinstance(message, Accepted):
            self.accepted = message
            self.threads, self.model = tuple(message.threads), message.model
            self._is_accepted = True
        elif isinstance(message, Attached):
            self.threads, self.model = (message.thread,), message.model
            self._is_accepted = True
        elif isinstance(message, Failed):
            self._fail(
                RemoteError(message.kind, message.detail, retry_after_ms=message.retry_after_ms)
            )
        else:
            detail = f"Generate was answered by {type(message).__name__}"
            self._fail(RemoteError(ErrorKind.INTERNAL, detail))
        self._wake()

    def asked(self, call: int) -> None:
        """The request has this number, unless it was answered at once."""
        if not self._is_accepted and self._failure is None:
            self._call = call

    # --- the reader ----------------------------------------------------------------------------

    async def wait_accepted(self) -> None:
        """Until the system has taken the request; raises its refusal."""
        try:
            while not self._is_accepted:
                if self._failure is not None:
                    raise self._failure
                await self._wait()
        except BaseException:
            self.close()
            raise

    async def take(self) -> list[Piece]:
        """All pieces that have come, at least one; none: all has ended. Acknowledges those taken
        before."""
        self._consume()
        while True:
            if self._rows:
                pieces = self._hand_out()
                if pieces:
                    return pieces
            if self._failure is not None:
                self.close()
                raise self._failure
            if not self._open:
                self.close()
                return []
            try:
                await self._wait()
            except BaseException:
                self.close()
                raise

    async def collect(self) -> Completion:
        """Read to the end, and put it together."""
        gatherings = {stream: Gathering(index) for index, stream in enumerate(self.streams)}
        while pieces := await self.take():
            for piece in pieces:
                gatherings[piece.stream].add(piece)
        return completion(list(gatherings.values()), self.model)

    def __aiter__(self) -> "Generation":
        return self

    async def __anext__(self) -> Piece:
        if not self._pieces:
            self._pieces = await self.take()
            self._pieces.reverse()
            if not self._pieces:
                raise StopAsyncIteration
        return self._pieces.pop()

    async def __aenter__(self) -> "Generation":
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    async def aclose(self) -> None:
        """Stop reading; cancels what is unfinished."""
        self.close()

    def detach(self) -> list[tuple[bytes, int]]:
        """Stop reading without cancelling; gives stream and offset to resume each unfinished choice
        from."""
        unread, self._pieces = self._pieces, []
        del self._handed[len(self._handed) - len(unread) :]
        for piece in unread:  # the last first
            self._open[piece.stream] = piece.offset - len(piece.text.encode())
        self._consume()
        places = list(self._open.items())
        self._leave(cancel=False)
        return places

    def close(self) -> None:
        """Stop reading; cancels what is unfinished.  Again: no effect."""
        self._consume()
        self._leave(cancel=True)

    # --- inside --------------------------------------------------------------------------------

    def _leave(self, *, cancel: bool) -> None:
        if self._call is not None and cancel:
            self._port.forget(self._call)
            self._call = None
        for stream in self.streams:
            self._port.listen(stream, None)
        for stream in self._open:
            self._port.feed(Close(stream, cancel=cancel))
        self._open = {}
        self._rows = []

    def _fail(self, error: RemoteError) -> None:
        if self._failure is None:
            self._failure = error
        self._wake()

    def _hand_out(self) -> list[Piece]:
        pieces = []
        rows, self._rows = self._rows, []
        for row in rows:
            self._handed.append(row)
            end = row.end
            if end is None:
                self._open[row.stream] = row.until
            else:
                self._open.pop(row.stream, None)
                if end.reason == "error":
                    self._fail(RemoteError(end.error or ErrorKind.INTERNAL, end.detail))
                    continue
            pieces.append(
                Piece(
                    text=row.text,
                    index=row.stream[16],
                    finish_reason=None if end is None else end.reason,
                    scores=row.scores,
                    prompt_scores=row.prompt_scores,
                    stream=row.stream,
                    offset=row.until,
                    tokens=row.tokens,
                    stop=None if end is None else end.stop,
                    usage=None if end is None else Usage(end.prompt_tokens, end.output_tokens),
                )
            )
        return pieces

    def _consume(self) -> None:
        """The reader has all that was handed out."""
        handed, self._handed = self._handed, []
        last = {row.stream: row for row in handed}
        for row in last.values():
            self._port.feed(Consumed(row.stream, row.until, row.tokens, ended=row.end is not None))

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def _wait(self) -> None:
        self._waiter = self._port.loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None


def open_generation(
    port: Port,
    generate: Generate,
    *,
    tenant: int | None = None,
    deadline_ns: int | None = None,
    wait_exhausted: bool = False,
) -> Generation:
    """Ask for it."""
    streams = [stream_id(generate.key, index) for index in range(generate.choices)]
    generation = Generation(port, streams)
    call = port.begin(
        lambda number: Open(
            number,
            generate,
            tenant=tenant,
            deadline_ns=deadline_ns,
            wait_exhausted=wait_exhausted,
        ),
        generation.answered,
    )
    generation.asked(call)
    return generation


def resume_generation(
    port: Port,
    stream: bytes,
    *,
    offset: int = 0,
    scores: int = 0,
    tenant: int | None = None,
    deadline_ns: int | None = None,
) -> Generation:
    """Ask for the rest of a stream."""
    generation = Generation(port, [stream], offset=offset)
    call = port.begin(
        lambda number: Resume(
            number,
            stream,
            offset=offset,
            scores=scores,
            tenant=tenant,
            deadline_ns=deadline_ns,
        ),
        generation.answered,
    )
    generation.asked(call)
    return generation
