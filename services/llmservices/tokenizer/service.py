"""The tokenizer's messages: requests become threads, committed tokens become text.

Everything that must not be overtaken by the tokens that follow (a spawned thread, an opened one) is
done in the callback of its message, never in a task that runs later.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from datetime import datetime
from pathlib import Path
from typing import Final, TypeVar

from libllm.events import Holding
from libllm.metrics import Reporter
from libllm.port import Port
from libllm.service import Handlers, Request, Service
from llmproto import limits, wire
from llmproto.base import Message
from llmproto.connection import Failed
from llmproto.encoding import Encode, Encoded, Vectors
from llmproto.errors import ErrorKind, RemoteError, invalid
from llmproto.generation import (
    Accepted,
    Attach,
    Attached,
    ChatMessage,
    Generate,
    StreamAcked,
    TokenizeAsk,
    Tokenized,
)
from llmproto.metrics import Metrics
from llmproto.models import (
    ModelAdd,
    ModelAdded,
    ModelAsk,
    ModelEntry,
    ModelFound,
    ModelRegister,
)
from llmproto.operation import Note
from llmproto.threads import (
    Committed,
    Done,
    SinkAcked,
    SinkDrop,
    SinkOpen,
    ThreadAdopt,
    ThreadCancel,
    ThreadEnd,
    ThreadSpawn,
    ThreadSpawned,
)

from llmservices.tokenizer.core import Gap, SinkThread, TextRow, reopen
from llmservices.tokenizer.encode import check_model, prepare_inputs, text_bytes
from llmservices.tokenizer.encodings import Encodings
from llmservices.tokenizer.folder import ModelFolder, inspect
from llmservices.tokenizer.measures import Measures
from llmservices.tokenizer.request import Prepared, encode_prompt, prepare
from llmservices.tokenizer.sink_state import SinkState, decode_sink_state
from llmservices.tokenizer.streams import Live, Streams, texts_of
from llmservices.tokenizer.vocabulary import Vocabularies, Vocabulary, load_vocabulary
from llmservices.tokenizer.worker import Worker

SPAWN_S: Final = 30
"""For how long a spawn is repeated; its client repeats the whole request anyway."""
SILENT_TOKENS_MAX: Final = limits.CREDIT_TOKENS // 4
"""Tokens without text after which their consumption is acknowledged: nobody else can."""
INLINE_BYTES: Final = 8192
"""Prompts up to this are encoded at once, within some 5 ms; longer ones beside the loop."""
LOADING_MS: Final = 60_000
"""A vocabulary of 262,000 tokens takes about two seconds of an unhurried core."""
REMIND_S: Final = limits.STREAM_SILENT_MS / 1000
"""An end that was not acknowledged for so long is said again, and then less and less often."""
SWAPS_MAX: Final = 8
"""How often a request may meet a swap on its way; each takes a model's loading time."""
LOST_MAX: Final = 1024
"""Streams that cannot be made anew, remembered to say why to whoever asks."""
T = TypeVar("T")


class Tokenizer(Service):
    """The sink of generations."""

    def __init__(
        self,
        port: Port,
        *,
        built_in: tuple[tuple[str, Path], ...],
        process: str = "tokenizer",
        incarnation: int = 0,
    ) -> None:
        """`built_in` are the models that come with the system: name and folder, default first."""
        self._port = port
        self._name = (process, incarnation)
        self._built_in = built_in
        self._streams = Streams()
        self._encodings = Encodings(port)
        self._vocabularies = Vocabularies()
        self._folders: dict[bytes, ModelFolder] = {}
        self._loading: dict[bytes, asyncio.Future[Vocabulary]] = {}
        self._worker = Worker()
        self._lost: dict[bytes, RemoteError] = {}
        """By stream: why it cannot go on."""
        self._measures = Measures()
        self._reporter = Reporter(port, self._metrics)
        self._progress = 0

    def handlers(self) -> Handlers:
        """Every message that the tokenizer takes."""
        return {
            Committed: self.committed,
            StreamAcked: self.stream_acked,
            Generate: self.generate,
            Attach: self.attach,
            SinkOpen: self.sink_open,
            SinkDrop: self.sink_drop,
            TokenizeAsk: self.tokenize,
            Encode: self.encode,
            Vectors: self.vectors,
            ModelAdd: self.add_model,
        }

    def holding(self) -> Holding:
        """All threads, each with the last position received."""
        live = self._streams.by_thread
        calls = self._encodings.by_thread
        positions = [max(one.position, 0) for one in live.values()]
        positions += [one.position for one in calls.values()]
        return Holding(self._progress, [*live, *calls], positions)

    async def start(self) -> None:
        """Put the built-in models into the table; the default's vocabulary is there for its first
        prompt."""
        for number, (name, path) in enumerate(self._built_in):
            folder = inspect(path)
            if number == 0:
                await self._vocabulary(folder)
            register = ModelRegister(self._entry(folder, name), default=number == 0)
            try:
                await self._port.call(register, Done)
            except RemoteError as error:
                # An older one goes on under its name while it has threads; a full disk takes none.
                self._port.send(Note(f"{name} is not registered: {error}"))
        self._progress = 1
        self._reporter.start()
        self._port.loop.call_later(REMIND_S, self.remind)

    async def drain(self) -> None:
        """The last numbers."""
        self._reporter.stop()

    def _metrics(self) -> Metrics:
        return self._measures.report(*self._name, streams=len(self._streams.by_thread))

    # --- requests ---------------------------------------------------------------------------------

    async def generate(self, generate: Generate, request: Request) -> Accepted:
        """Encode, spawn a thread for each choice, accept."""
        self._progress += 1
        self._measures.requests.add()
        self._reporter.changed()
        began_s = time.monotonic()
        try:
            return await self._current(lambda: self._accept(generate, request, began_s))
        except RemoteError:
            self._measures.refused.add()
            raise

    async def _current(self, attempt: Callable[[], Awaitable[T]]) -> T:
        """Try again where what a deployment serves was swapped between the question for the model
        and the spawn."""
        for _ in range(SWAPS_MAX):
            try:
                return await attempt()
            except RemoteError as error:
                if error.kind is not ErrorKind.STALE:
                    raise
        return await attempt()

    async def _accept(self, generate: Generate, request: Request, began_s: float) -> Accepted:
        found = await self._found(generate.model)
        folder, vocabulary = await self._load(found.model)
        now = datetime.now().astimezone()
        prepared = await self._beside(
            _prompt_bytes(generate.prompt, generate.messages),
            lambda: prepare(generate, vocabulary, folder, now=now),
        )

        def spawn(choice: int) -> "asyncio.Future[bytes]":
            return self._spawn(
                generate, choice, found, prepared, vocabulary, folder, request, began_s
            )

        # Once one choice stands, the others wait for room: cancelling it would end its key.
        first = await spawn(0)
        try:
            rest = await self._all([spawn(choice) for choice in range(1, generate.choices)])
        except RemoteError as error:
            if error.kind is not ErrorKind.STALE:  # tried again, with the same key
                self._port.send(ThreadCancel(first))
            raise
        self._measures.prompt_tokens.add(len(prepared.tokens))
        return Accepted(
            threads=[first, *rest],
            model=found.model.name,
            prompt_tokens=len(prepared.tokens),
            prompt=prepared.tokens if prepared.prompt_texts else [],
            prompt_texts=prepared.prompt_texts,
        )

    async def _all(self, spawned: "list[asyncio.Future[bytes]]") -> list[bytes]:
        """The threads, or none of them: where one was refused the others are cancelled."""
        try:
            return [await future for future in spawned]
        except RemoteError:
            for future in spawned:
                if not future.done():
                    future.cancel()  # `_spawn` cancels its thread when it is answered
                elif not future.cancelled() and future.exception() is None:
                    self._port.send(ThreadCancel(future.result()))
            raise

    async def _beside(self, prompt_bytes: int, call: Callable[[], T]) -> T:
        """Call it here if it is quick, else beside the loop."""
        if prompt_bytes <= INLINE_BYTES:
            return call()
        return await self._worker.do(call)

    def _spawn(
        self,
        generate: Generate,
        choice: int,
        found: ModelFound,
        prepared: Prepared,
        vocabulary: Vocabulary,
        folder: ModelFolder,
        request: Request,
        began_s: float,
    ) -> "asyncio.Future[bytes]":
        stream = generate.key + bytes([choice])
        sampling = prepared.sampling_of(choice)
        state = SinkState(
            model=found.model.name,
            tokenizer_digest=folder.tokenizer_digest,
            folder=folder.path,
            stream=stream,
            session=request.source,
            tenant=request.tenant or 0,
            stops=generate.stops,
            hidden=prepared.hidden,
            wants_scores=sampling.logprobs is not None,
            wants_prompt_scores=sampling.prompt_logprobs and sampling.logprobs is not None,
            resumable=generate.resumable,
        )
        future: asyncio.Future[bytes] = self._port.loop.create_future()

        def answered(answer: Message) -> None:
            if isinstance(answer, ThreadSpawned) and future.cancelled():
                self._port.send(ThreadCancel(answer.thread))
            elif isinstance(answer, ThreadSpawned):
                if answer.thread not in self._streams.by_thread and not answer.existing:
                    text = SinkThread(vocabulary, state, prepared.tokens)
                    live = Live(
                        answer.thread,
                        text,
                        stream=stream,
                        session=request.source,
                        tenant=request.tenant or 0,
                    )
                    live.began_s = began_s
                    self._streams.put(live)
                if not future.done():
                    future.set_result(answer.thread)
            elif isinstance(answer, Failed) and not future.done():
                error = RemoteError(
                    answer.kind, answer.detail, retry_after_ms=answer.retry_after_ms
                )
                future.set_exception(error)

        spawn = ThreadSpawn(
            key=generate.key,
            index=choice,
            digest=prepared.digest,
            model=found.model.name,
            deployment=found.deployment,
            tokens=wire.pack_tokens(prepared.tokens),
            output_tokens_max=prepared.output_tokens_max,
            sampling=sampling,
            sink_state=state.encode(),
            service_class=generate.service_class,
            priority=generate.priority,
            deadline_ms=request.header.deadline_ms,
            resumable=generate.resumable,
        )
        deadline_ns = time.monotonic_ns() + SPAWN_S * 1_000_000_000
        self._port.ask(
            spawn,
            answered,
            cause=request.id,
            deadline_ns=deadline_ns,
            wait_exhausted=choice > 0,
        )
        return future

    async def tokenize(self, ask: TokenizeAsk, request: Request) -> Tokenized:
        """What ids a text becomes."""
        entry = (await self._found(ask.model)).model
        folder, vocabulary = await self._load(entry)
        now = datetime.now().astimezone()
        tokens = await self._beside(
            _prompt_bytes(ask.prompt, ask.messages),
            lambda: encode_prompt(
                vocabulary, folder, prompt=ask.prompt, messages=ask.messages, now=now
            ),
        )
        return Tokenized(tokens, entry.context_tokens)

    async def encode(self, encode: Encode, request: Request) -> None:
        """Encode the inputs, spawn their thread, answer with its vectors."""
        self._progress += 1
        self._measures.requests.add()
        self._reporter.changed()
        await self._current(lambda: self._encode(encode, request))

    async def _encode(self, encode: Encode, request: Request) -> None:
        try:
            found = await self._found(encode.model)
            entry = found.model
            check_model(encode, entry)
            folder, vocabulary = await self._load(entry)
            prepared = await self._beside(
                text_bytes(encode), lambda: prepare_inputs(encode, vocabulary, folder)
            )
        except RemoteError:
            self._measures.refused.add()
            raise
        self._measures.prompt_tokens.add(len(prepared.tokens))
        width, vectors = await self._encodings.compute(
            encode,
            found,
            prepared,
            cause=request.id,
            deadline_ms=request.header.deadline_ms,
        )
        answer = Encoded(
            model=entry.name,
            width=width,
            tokens=prepared.lengths,
            truncated=prepared.truncated,
            labels=list(folder.task.labels),
            problem=folder.task.problem,
        )
        request.reply(answer, blobs=(vectors,))

    def vectors(self, vectors: Vectors, request: Request) -> None:
        """Calls are computed."""
        self._progress += 1
        self._encodings.vectors(vectors, request.blobs[0])

    # --- models -----------------------------------------------------------------------------------

    async def add_model(self, add: ModelAdd, request: Request) -> ModelAdded:
        """Examine a folder and register it, on behalf of an operator."""
        path = Path(add.path)
        if not path.is_absolute():
            raise invalid(f"{add.path!r} is not an absolute path")
        folder = await self._worker.do(lambda: inspect(path))
        await self._vocabulary(folder)
        name = add.name if add.name is not None else Path(folder.path).name
        entry = self._entry(folder, name)
        await self._port.call(ModelRegister(entry), Done, cause=request.id)
        return ModelAdded(name, folder.digest, folder.task.kind)

    def _entry(self, folder: ModelFolder, name: str) -> ModelEntry:
        self._folders[folder.digest] = folder
        return ModelEntry(
            name=name,
            path=folder.path,
            digest=folder.digest,
            architecture=folder.architecture or folder.model_type or "unknown",
            context_tokens=min(folder.context_tokens, limits.CONTEXT_TOKENS_MAX),
            vocabulary=folder.vocab_tokens,
            weight_bytes=folder.weight_bytes,
            end_tokens=list(folder.eos_tokens),
            chat=folder.has_chat_template,
            task=folder.task.kind,
            tokenizer=folder.tokenizer_digest,
            version=folder.version,
        )

    async def _found(self, name: str | None) -> ModelFound:
        return await self._port.call(ModelAsk(name), ModelFound)

    async def _load(self, entry: ModelEntry) -> tuple[ModelFolder, Vocabulary]:
        """A model's folder and vocabulary, read when first asked for."""
        folder = self._folders.get(entry.digest)
        if folder is None:
            folder = await self._worker.do(lambda: inspect(Path(entry.path)))
            if folder.digest != entry.digest:
                raise invalid(
                    f"{entry.path} has changed since {entry.name!r} was added "
                    f"({entry.digest.hex()[:8]}, now {folder.digest.hex()[:8]}): add it again"
                )
            self._folders[entry.digest] = folder
            while len(self._folders) > limits.MODELS_MAX:
                del self._folders[next(iter(self._folders))]
        return folder, await self._vocabulary(folder)

    async def _vocabulary(self, folder: ModelFolder) -> Vocabulary:
        """Loaded beside the loop, once for all who ask meanwhile."""
        digest = folder.tokenizer_digest
        vocabulary = self._vocabularies.find(digest)
        if vocabulary is None:
            loading = self._loading.get(digest)
            if loading is None:
                # The library reads without letting go of the interpreter: nothing beats meanwhile.
                self._port.working("loading", budget_ms=LOADING_MS)
                load = self._worker.do(lambda: load_vocabulary(Path(folder.path)))
                loading = self._loading[digest] = asyncio.ensure_future(load)
                loading.add_done_callback(lambda _: self._loaded(digest))
            vocabulary = await asyncio.shield(loading)
        self._vocabularies.put(digest, vocabulary)
        return vocabulary

    def _loaded(self, digest: bytes) -> None:
        del self._loading[digest]
        if not self._loading:
            self._port.working("loading", budget_ms=0)

    # --- committed tokens -------------------------------------------------------------------------

    def committed(self, commit: Committed, request: Request) -> None:
        """One step: one row a thread, one message a reader."""
        live_of = self._streams.by_thread
        readers: dict[bytes, list[tuple[Live, TextRow]]] = {}
        silent: list[Live] = []
        written_bytes = 0
        scores, prompt_scores, errors = commit.scores, commit.prompt_scores, commit.errors
        for row, (thread, position, token, end) in enumerate(
            zip(commit.threads, commit.positions, commit.tokens, commit.ends)
        ):
            live = live_of.get(thread)
            if live is None:
                if end:
                    self._encodings.ended(thread, end, "" if errors is None else errors[row])
                continue
            text = live.text.push(
                position,
                token,
                end,
                None if scores is None else scores[row],
                prompt_scores=None if prompt_scores is None else prompt_scores[row],
                error="" if errors is None else errors[row],
            )
            if isinstance(text, TextRow):
                live.silent = 0
                if text.at is not None:
                    self._port.send(ThreadEnd(thread, text.at))
                if live.given_up:
                    if text.end is not None:
                        self._forget_ended(live)
                    continue
                readers.setdefault(live.session, []).append((live, text))
                written_bytes += len(text.text)
                if live.began_s is not None:
                    self._measures.first_text.add(time.monotonic() - live.began_s)
                    live.began_s = None
            elif not isinstance(text, Gap):
                live.silent += 1
                if live.silent >= SILENT_TOKENS_MAX:
                    silent.append(live)
        self._progress += 1
        for session, rows in readers.items():
            for message in texts_of(rows):
                self._port.send(message, peer=session)
        if silent:
            self._acknowledge_silence(silent)
        self._measures.output_tokens.add(len(commit.tokens))
        self._measures.output_bytes.add(written_bytes)
        self._reporter.changed()

    def _forget_ended(self, live: Live) -> None:
        """Its reader gave it up before the end: the end is consumed all the same."""
        self._streams.drop(live.thread)
        self._port.send(SinkAcked([live.thread], [live.text.next_position - 1], [True]))

    def _acknowledge_silence(self, silent: list[Live]) -> None:
        """Tokens that made no text are consumed as far as their reader has consumed the text."""
        acks = SinkAcked([], [], [])
        for live in silent:
            live.silent = 0
            position = live.text.acked_position()
            if position is not None and position > live.acked:
                live.acked = position
                acks.threads.append(live.thread)
                acks.positions.append(position)
                acks.ended.append(False)
        if acks.threads:
            self._port.send(acks)

    def sink_open(self, opened: SinkOpen, request: Request) -> None:
        """A thread of an earlier incarnation, or one of which something was lost."""
        if not opened.sink_state:
            self._encodings.opened(opened)
            return
        state = decode_sink_state(opened.sink_state)
        try:
            vocabulary = self._reopened(state)
        except RemoteError as error:
            self._lose(opened, state, error)
            return
        text = reopen(vocabulary, state, opened)
        live = Live(
            opened.thread,
            text,
            stream=state.stream,
            session=opened.session,
            tenant=opened.tenant,
        )
        live.acked = opened.acked
        self._streams.put(live)
        if text.end is not None and text.end.stop is not None:
            self._port.send(ThreadEnd(opened.thread, text.next_position - 1))
        known = text.offset_after(opened.acked) if opened.acked >= opened.prompt_tokens else 0
        self._send_since(live, known, 0)

    def _reopened(self, state: SinkState) -> Vocabulary:
        """The vocabulary that a thread began with; INVALID where it is not to be had any more.

        Loaded at once: the tokens that follow must not overtake.
        """
        vocabulary = self._vocabularies.find(state.tokenizer_digest)
        if vocabulary is not None:
            return vocabulary
        folder = inspect(Path(state.folder))
        if folder.tokenizer_digest != state.tokenizer_digest:
            raise invalid(f"{state.folder}: its tokenizer has changed since the stream began")
        return self._vocabularies.get(folder)

    def _lose(self, opened: SinkOpen, state: SinkState, error: RemoteError) -> None:
        """The text cannot be made: the thread ends, and whoever reads it is told why."""
        self._lost[state.stream] = error
        while len(self._lost) > LOST_MAX:
            del self._lost[next(iter(self._lost))]
        if opened.end:
            last = len(opened.tokens) // 4 - 1
            self._port.send(SinkAcked([opened.thread], [last], [True]))
        else:
            self._port.send(ThreadCancel(opened.thread))

    def sink_drop(self, drop: SinkDrop, request: Request) -> None:
        """The kernel knows nothing of these any more."""
        for thread in drop.threads:
            if not self._encodings.dropped(thread):
                self._streams.drop(thread)

    # --- readers ----------------------------------------------------------------------------------

    def stream_acked(self, acked: StreamAcked, request: Request) -> None:
        """What readers have consumed, passed on as positions."""
        acks = SinkAcked([], [], [])
        for stream, offset, tokens, ended in zip(
            acked.streams, acked.offsets, acked.tokens, acked.ended
        ):
            live = self._streams.by_stream.get(stream)
            if live is None or live.session != request.source:
                continue  # read by another session by now
            if offset > live.text.emitted:
                continue  # a reader ahead of a sink that is still catching up; it says it again
            live.given_up = ended
            position = live.text.ack(offset, tokens)
            over = ended and live.text.end is not None
            if over:
                position = live.text.next_position - 1
                self._streams.drop(live.thread)
            if position is not None and (over or position >= live.acked):
                live.acked = position
                acks.threads.append(live.thread)
                acks.positions.append(position)
                acks.ended.append(over)
        if acks.threads:
            self._port.send(acks)

    async def attach(self, attach: Attach, request: Request) -> Attached:
        """A reader wants the stream from its offset on, and all that follows."""
        live = self._streams.by_stream.get(attach.stream)
        if live is None:
            if attach.stream in self._lost:
                raise self._lost[attach.stream]
            raise RemoteError(
                ErrorKind.STALE,
                f"stream {attach.stream.hex()} is not known: it ended and its end was consumed, "
                "or it never was",
            )
        if live.session != request.source or live.tenant != request.tenant:
            await self._port.call(ThreadAdopt(live.thread), Done, cause=request.id)
            live = self._streams.by_stream.get(attach.stream, live)
            live.session = request.source
        live.given_up = False
        self._send_since(live, attach.offset, attach.scores)
        return Attached(live.thread, live.text.state.model, live.text.emitted)

    def remind(self) -> None:
        """Say ends again, now and then: a reader's last acknowledgement may have been lost."""
        self._port.loop.call_later(REMIND_S, self.remind)
        for live in list(self._streams.by_thread.values()):  # at most limits.THREADS_MAX
            if live.text.end is None:
                continue
            live.reminders += 1
            if live.reminders > 1 and live.reminders.bit_count() == 1:
                scores = live.text.delivered_tokens if live.text.state.wants_scores else 0
                self._send_since(live, live.text.emitted, scores)

    def _send_since(self, live: Live, offset: int, scores: int) -> None:
        row = live.text.since(offset, scores)
        if row.text or row.end is not None or row.scores or row.prompt_scores:
            for message in texts_of([(live, row)]):
                self._port.send(message, peer=live.session)


def _prompt_bytes(prompt: str | None, messages: list[ChatMessage] | None) -> int:
    """About how much is to be encoded."""
    return len(prompt or "") + sum(len(message.content) for message in messages or ())
