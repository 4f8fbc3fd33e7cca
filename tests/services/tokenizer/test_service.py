"""The tokenizer's messages, with a port whose kernel is the test, and small real vocabularies."""

import asyncio
import json
import struct
import threading
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import pytest
from libllm.events import Answer, Call, Event, Post
from libllm.port import Port
from libllm.service import Request
from llmproto import limits, wire
from llmproto.base import Header, Message
from llmproto.connection import Failed, Working
from llmproto.encoding import Encode, Vectors
from llmproto.errors import ErrorKind, RemoteError
from llmproto.generation import (
    Accepted,
    Attach,
    Attached,
    Generate,
    Sampling,
    StreamAcked,
    Text,
    TokenizeAsk,
    Tokenized,
    TokenScore,
)
from llmproto.metrics import Metrics
from llmproto.models import ModelAdd, ModelAdded, ModelAsk, ModelEntry, ModelFound, ModelRegister
from llmproto.threads import (
    END_CANCEL,
    END_ERROR,
    END_LENGTH,
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
from llmservices.tokenizer.request import prepare
from llmservices.tokenizer.service import INLINE_BYTES, LOADING_MS, SILENT_TOKENS_MAX, Tokenizer
from llmservices.tokenizer.sink_state import decode_sink_state
from llmservices.tokenizer.vocabulary import load_vocabulary

M = TypeVar("M", bound=Message)
READER, OTHER = b"r" * 16, b"o" * 16
KEY = b"k" * 16


class Kernel(Port):
    """Collects what is said, and answers what is asked."""

    def __init__(self) -> None:
        super().__init__(self._take)
        self.posts: list[Post] = []
        self.calls: list[Call] = []
        self.models: dict[str | None, ModelEntry] = {}
        self.refusals: dict[type[Message], list[Failed]] = {}
        self.held: set[type[Message]] = set()
        """Kinds that are answered only by `answer`."""
        self.existing = False
        self.threads = 0

    def _take(self, event: Event) -> None:
        if isinstance(event, Post):
            self.posts.append(event)
        elif isinstance(event, Call):
            self.calls.append(event)
            if type(event.message) not in self.held:
                self.loop.call_soon(self.answer, event)

    def answer(self, call: Call) -> None:
        self.deliver(Answer(call.call, self._answer_to(call.message)))

    def _answer_to(self, message: Message) -> Message:
        refusals = self.refusals.get(type(message))
        if refusals:
            return refusals.pop(0)
        match message:
            case ModelAsk():
                found = self.models.get(message.name)
                return Failed(ErrorKind.INVALID, "unknown") if found is None else ModelFound(found)
            case ModelRegister():
                self.models[message.model.name] = message.model
                if message.default:
                    self.models[None] = message.model
                return Done()
            case ThreadSpawn():
                self.threads += 1
                return ThreadSpawned(b"thread%02d" % self.threads, self.existing)
            case _:
                return Done()

    def said(self, kind: type[M]) -> list[M]:
        """Everything of this kind that was said, and forget it."""
        found = [post.message for post in self.posts if isinstance(post.message, kind)]
        self.posts = [post for post in self.posts if not isinstance(post.message, kind)]
        return found

    def asked(self, kind: type[M]) -> list[M]:
        return [call.message for call in self.calls if isinstance(call.message, kind)]


class Desk:
    """A tokenizer with the small byte-level vocabulary."""

    def __init__(self, folder: Path) -> None:
        self.kernel = Kernel()
        self.tokenizer = Tokenizer(self.kernel, built_in=(("small", folder),))
        self.ids = 0

    def request(
        self, source: bytes = READER, tenant: int = 1, deadline_ms: int | None = None
    ) -> Request:
        self.ids += 1
        header = Header(1, 0x0101, self.ids.to_bytes(16), source=source, tenant=tenant)
        return Request(msgspec.structs.replace(header, deadline_ms=deadline_ms), self.kernel)

    async def generate(self, **changes: Any) -> Accepted:  # Generate's fields
        generate = Generate(key=KEY, prompt="the", sampling=Sampling(seed=1))
        generate = msgspec.structs.replace(generate, **changes)
        return await self.tokenizer.generate(generate, self.request())

    def commit(self, *rows: tuple[bytes, int, int | None, int], **columns: Any) -> list[Text]:
        """Rows of (thread, position, token, end); the texts that come of it."""
        self.tokenizer.committed(
            Committed(*map(list, zip(*rows)), **columns),
            self.request(b""),
        )
        self.check()
        return self.kernel.said(Text)

    def ids_of(self, text: str) -> list[int]:
        (vocabulary,) = self.tokenizer._vocabularies._loaded.values()
        return vocabulary.encode(text)

    def write(self, thread: bytes, at: int, text: str) -> tuple[list[Text], int]:
        """Commit this text's tokens, one step each."""
        texts: list[Text] = []
        for token in self.ids_of(text):
            texts += self.commit((thread, at, token, 0))
            at += 1
        return texts, at

    def opened(self, spawn: ThreadSpawn, output: list[int], **changes: Any) -> SinkOpen:
        """The thread of this spawn as the kernel keeps it."""
        tokens = spawn.tokens + wire.pack_tokens(output)
        opened = SinkOpen(
            b"thread01", 1, READER, spawn.sink_state, len(spawn.tokens) // 4, tokens, 0
        )
        return msgspec.structs.replace(opened, **changes)

    def check(self) -> None:
        self.tokenizer._streams.check()


@pytest.fixture
def folder(tmp_path: Path, byte_level_file: str) -> Path:
    made = tmp_path / "small"
    made.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "max_position_embeddings": 100_000,
        "vocab_size": 300,
        "eos_token_id": 1,
    }
    (made / "config.json").write_text(json.dumps(config))
    (made / "tokenizer.json").write_text(byte_level_file)
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    (made / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    header = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    (made / "model.safetensors").write_bytes(
        struct.pack("<Q", len(header)) + header + struct.pack("<f", 0.0)
    )
    return made


@pytest.fixture
async def desk(folder: Path) -> Desk:
    made = Desk(folder)
    await made.tokenizer.start()
    return made


def joined(texts: list[Text]) -> str:
    """One reader's text, with every offset right."""
    whole = b""
    for text in texts:
        for offset, part in zip(text.offsets, text.texts):
            assert offset == len(whole)
            whole += part.encode()
    return whole.decode()


# --- requests -------------------------------------------------------------------------------------


async def test_it_registers_what_comes_with_the_system(desk: Desk, folder: Path) -> None:
    (register,) = desk.kernel.asked(ModelRegister)
    assert (register.model.name, register.default) == ("small", True)
    assert (register.model.context_tokens, register.model.end_tokens) == (100_000, [1])
    assert len(desk.tokenizer._vocabularies) == 1
    assert len(desk.kernel.said(Metrics)) == 1
    assert desk.tokenizer.holding().progress == 1


async def test_a_request_becomes_a_thread(desk: Desk) -> None:
    accepted = await desk.generate(output_tokens_max=5, stops=["x"])
    assert accepted == Accepted([b"thread01"], "small", len(desk.ids_of("the")))
    (spawn,) = desk.kernel.asked(ThreadSpawn)
    assert spawn.tokens == wire.pack_tokens(desk.ids_of("the"))
    assert (spawn.key, spawn.index, spawn.output_tokens_max) == (KEY, 0, 5)
    assert spawn.sampling.stop_tokens == [1]
    state = decode_sink_state(spawn.sink_state)
    assert (state.stream, state.session, state.stops) == (KEY + b"\0", READER, ["x"])
    assert desk.kernel.calls[-1].cause == desk.ids.to_bytes(16)


async def test_choices_are_threads_with_seeds_of_their_own(desk: Desk) -> None:
    accepted = await desk.generate(choices=3)
    assert accepted.threads == [b"thread01", b"thread02", b"thread03"]
    spawns = desk.kernel.asked(ThreadSpawn)
    assert [(spawn.index, spawn.sampling.seed) for spawn in spawns] == [(0, 1), (1, 2), (2, 3)]


async def test_an_unknown_model_is_refused(desk: Desk) -> None:
    with pytest.raises(RemoteError, match="unknown"):
        await desk.generate(model="nobody's")


async def test_a_refused_first_choice_refuses_the_request(desk: Desk) -> None:
    desk.kernel.refusals[ThreadSpawn] = [Failed(ErrorKind.EXHAUSTED, "full", 100)]
    with pytest.raises(RemoteError) as refused:
        await desk.generate(choices=4)
    assert (refused.value.kind, refused.value.retry_after_ms) == (ErrorKind.EXHAUSTED, 100)
    assert len(desk.kernel.asked(ThreadSpawn)) == 1
    assert desk.kernel.said(ThreadCancel) == []


async def test_further_choices_wait_for_room(desk: Desk) -> None:
    """Cancelling the first would end its key, and the client repeats the request with it."""
    await desk.generate(choices=3)
    spawns = [call for call in desk.kernel.calls if isinstance(call.message, ThreadSpawn)]
    assert [spawn.wait_exhausted for spawn in spawns] == [False, True, True]


async def test_one_refused_choice_cancels_its_siblings(desk: Desk) -> None:
    gone = Failed(ErrorKind.DEADLINE, "too late")
    desk.kernel.held.add(ThreadSpawn)
    asking = asyncio.create_task(desk.generate(choices=4))

    async def spawns(count: int) -> list[Call]:
        while len(desk.kernel.asked(ThreadSpawn)) < count:  # noqa: ASYNC110 - a test's own kernel
            await asyncio.sleep(0)
        return [c for c in desk.kernel.calls if isinstance(c.message, ThreadSpawn)]

    desk.kernel.answer((await spawns(1))[0])
    _, second, third, late = await spawns(4)
    desk.kernel.answer(second)
    desk.kernel.refusals[ThreadSpawn] = [gone]
    desk.kernel.answer(third)
    with pytest.raises(RemoteError) as refused:
        await asking
    assert refused.value.kind is ErrorKind.DEADLINE
    assert desk.kernel.said(ThreadCancel) == [
        ThreadCancel(b"thread02"),
        ThreadCancel(b"thread01"),
    ]
    desk.kernel.answer(late)  # what is spawned after that is not wanted either
    assert desk.kernel.said(ThreadCancel) == [ThreadCancel(b"thread03")]


async def test_a_key_that_is_known_goes_on_where_its_thread_is(desk: Desk) -> None:
    await desk.generate()
    (spawn,) = desk.kernel.asked(ThreadSpawn)
    desk.write(b"thread01", len(spawn.tokens) // 4, "he he")
    desk.kernel.existing, desk.kernel.threads = True, 0
    assert (await desk.generate()).threads == [b"thread01"]
    assert desk.tokenizer._streams.by_thread[b"thread01"].text.emitted == 5


async def test_ids_of_a_text(desk: Desk) -> None:
    ask = TokenizeAsk(prompt="the two words")
    found = await desk.tokenizer.tokenize(ask, desk.request())
    assert found == Tokenized(desk.ids_of("the two words"), 100_000)


# --- blocking work --------------------------------------------------------------------------------


async def test_long_prompts_are_encoded_beside_the_loop(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    where: list[str] = []

    def watched(*given: Any, **named: Any) -> Any:  # prepare's own
        where.append(threading.current_thread().name)
        return prepare(*given, **named)

    monkeypatch.setattr(f"{Tokenizer.__module__}.prepare", watched)
    await desk.generate(prompt="x" * INLINE_BYTES)
    await desk.generate(prompt="x" * (INLINE_BYTES + 1))
    assert where[0] == threading.main_thread().name
    assert where[1].startswith("worker")


async def test_a_vocabulary_is_loaded_once_for_all_who_ask(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk.tokenizer._vocabularies._loaded.clear()
    loads: list[str] = []

    def watched(path: Path) -> Any:  # a Vocabulary
        loads.append(threading.current_thread().name)
        return load_vocabulary(path)

    monkeypatch.setattr(f"{Tokenizer.__module__}.load_vocabulary", watched)
    ask = TokenizeAsk(prompt="a")
    await asyncio.gather(*(desk.tokenizer.tokenize(ask, desk.request()) for _ in range(5)))
    assert len(loads) == 1
    assert loads[0].startswith("worker")
    assert desk.tokenizer._loading == {}


# --- models ---------------------------------------------------------------------------------------


async def test_a_folder_is_added(desk: Desk, folder: Path) -> None:
    add = ModelAdd(str(folder), "again")
    added = await desk.tokenizer.add_model(add, desk.request())
    assert added == ModelAdded("again", desk.kernel.models["small"].digest)
    assert desk.kernel.calls[-1].cause == desk.ids.to_bytes(16)
    assert (await desk.generate(model="again")).model == "again"


async def test_a_vocabulary_is_announced_before_it_is_read(folder: Path) -> None:
    """The library reads it without letting go of the interpreter, so that nothing beats."""
    desk = Desk(folder)
    await desk.tokenizer.add_model(ModelAdd(str(folder)), desk.request())
    assert desk.kernel.said(Working) == [Working("loading", LOADING_MS), Working("loading", 0)]
    await desk.tokenizer.add_model(ModelAdd(str(folder)), desk.request())
    assert not desk.kernel.said(Working)


@pytest.mark.parametrize("path", ["relative", "/none/such"])
async def test_what_is_no_folder_is_refused(desk: Desk, path: str) -> None:
    with pytest.raises(RemoteError) as refused:
        await desk.tokenizer.add_model(ModelAdd(path), desk.request())
    assert refused.value.kind is ErrorKind.INVALID


async def test_a_folder_that_has_changed_is_refused(desk: Desk, folder: Path) -> None:
    desk.tokenizer._folders.clear()
    (folder / "generation_config.json").write_text('{"eos_token_id": 2}')
    with pytest.raises(RemoteError, match="has changed since"):
        await desk.generate()


# --- text -----------------------------------------------------------------------------------------


async def test_a_step_is_one_message_for_each_reader(desk: Desk) -> None:
    await desk.generate(choices=2)
    await desk.tokenizer.generate(
        Generate(key=b"q" * 16, prompt="the"), desk.request(source=OTHER, tenant=2)
    )
    (h,) = desk.ids_of("h")
    at = len(desk.ids_of("the"))
    desk.commit(*[(b"thread%02d" % n, at, h, 0) for n in (1, 2, 3)])
    desk.kernel.posts.clear()
    desk.tokenizer.committed(
        Committed([b"thread%02d" % n for n in (1, 2, 3, 9)], [at + 1] * 4, [h] * 4, [0] * 4),
        desk.request(b""),
    )
    first, second = desk.kernel.posts
    assert (first.peer, second.peer) == (READER, OTHER)
    assert isinstance(first.message, Text) and isinstance(second.message, Text)
    assert first.message.streams == [KEY + b"\0", KEY + b"\1"]
    assert (first.message.texts, first.message.offsets) == (["h", "h"], [1, 1])
    assert second.message.streams == [b"q" * 16 + b"\0"]


async def test_a_stop_string_ends_the_thread(desk: Desk) -> None:
    await desk.generate(stops=["he h"])
    at = len(desk.ids_of("the"))
    texts, end = desk.write(b"thread01", at, "a he he")
    assert joined(texts) == "a "
    assert texts[-1].ends[0] is not None
    assert texts[-1].ends[0].stop == "he h"
    (ended,) = desk.kernel.said(ThreadEnd)
    assert ended.thread == b"thread01"
    assert at < ended.at < end


@pytest.mark.parametrize(
    ("end", "reason", "kind"),
    [
        (END_LENGTH, "length", None),
        (END_ERROR, "error", ErrorKind.INVALID),
        (END_CANCEL, "cancel", None),
    ],
)
async def test_an_end_is_told(desk: Desk, end: int, reason: str, kind: ErrorKind | None) -> None:
    await desk.generate()
    at = len(desk.ids_of("the"))
    errors = ["INVALID: too long"] if end == END_ERROR else None
    (text,) = desk.commit((b"thread01", at, None, end), errors=errors)
    (found,) = text.ends
    assert found is not None
    assert (found.reason, found.error) == (reason, kind)


async def test_lost_positions_are_left_to_the_beat(desk: Desk) -> None:
    await desk.generate()
    at = len(desk.ids_of("the"))
    (h,) = desk.ids_of("h")
    assert desk.commit((b"thread01", at + 1, h, 0)) == []
    assert desk.tokenizer.holding().positions == [at - 1]
    desk.commit((b"thread01", at, h, 0))
    assert desk.tokenizer.holding().threads == [b"thread01"]
    assert desk.tokenizer.holding().positions == [at]
    desk.commit((b"thread01", at + 1, None, END_LENGTH))
    assert desk.tokenizer.holding().positions == [at + 1]  # with the end one more


# --- acknowledgements -----------------------------------------------------------------------------


def acked(offset: int, tokens: int, *, ended: bool = False) -> StreamAcked:
    return StreamAcked([KEY + b"\0"], [offset], [tokens], [ended])


async def test_what_is_read_gives_credit_and_never_takes_it_back(desk: Desk) -> None:
    await desk.generate()
    at = len(desk.ids_of("the"))
    desk.write(b"thread01", at, "abcdef")
    request = desk.request()
    desk.tokenizer.stream_acked(acked(3, 3), request)
    assert desk.kernel.said(SinkAcked) == [SinkAcked([b"thread01"], [at + 2], [False])]
    for offset in (3, 1):  # again (what was said of it may have been lost), and late
        desk.tokenizer.stream_acked(acked(offset, offset), request)
        assert desk.kernel.said(SinkAcked) == [SinkAcked([b"thread01"], [at + 2], [False])]
    desk.tokenizer.stream_acked(acked(99, 99), request)  # ahead of a sink that was made anew
    assert desk.kernel.said(SinkAcked) == []
    desk.tokenizer.stream_acked(acked(6, 6), desk.request(source=OTHER))
    assert desk.kernel.said(SinkAcked) == []  # not the reader's
    desk.tokenizer.stream_acked(acked(6, 6), request)
    assert desk.kernel.said(SinkAcked) == [SinkAcked([b"thread01"], [at + 5], [False])]


async def test_a_consumed_end_drops_the_thread(desk: Desk) -> None:
    await desk.generate()
    at = len(desk.ids_of("the"))
    (h,) = desk.ids_of("h")
    desk.commit((b"thread01", at, h, END_LENGTH))
    desk.tokenizer.stream_acked(acked(1, 1, ended=True), desk.request())
    assert desk.kernel.said(SinkAcked) == [SinkAcked([b"thread01"], [at], [True])]
    assert desk.tokenizer.holding().threads == []
    desk.tokenizer.stream_acked(acked(1, 1, ended=True), desk.request())
    assert desk.kernel.said(SinkAcked) == []


@pytest.mark.parametrize("logprobs", [None, 0])
async def test_an_end_that_is_not_acknowledged_is_told_again(
    desk: Desk, logprobs: int | None
) -> None:
    await desk.generate(sampling=Sampling(seed=1, logprobs=logprobs))
    at = len(desk.ids_of("the"))
    (h,) = desk.ids_of("h")
    scores = None if logprobs is None else [TokenScore(h, -1.0)]
    (told,) = desk.commit((b"thread01", at, h, END_LENGTH), scores=scores)
    reminders = []
    for _ in range(8):
        desk.tokenizer.remind()
        reminders.append(desk.kernel.said(Text))
    assert [len(said) for said in reminders] == [0, 1, 0, 1, 0, 0, 0, 1]
    for said in reminders:
        for text in said:
            assert (text.texts, text.offsets, text.tokens) == ([""], [1], told.tokens)
            assert text.ends == told.ends
    desk.tokenizer.stream_acked(acked(1, 1, ended=True), desk.request())
    for _ in range(16):
        desk.tokenizer.remind()
    assert desk.kernel.said(Text) == []


async def test_a_stream_given_up_before_its_end_is_acknowledged_at_it(desk: Desk) -> None:
    await desk.generate()
    at = len(desk.ids_of("the"))
    (h,) = desk.ids_of("h")
    desk.commit((b"thread01", at, h, 0))
    desk.tokenizer.stream_acked(acked(1, 1, ended=True), desk.request())
    desk.kernel.said(SinkAcked)
    assert desk.commit((b"thread01", at + 1, h, 0)) == []
    assert desk.commit((b"thread01", at + 2, None, END_CANCEL)) == []
    assert desk.kernel.said(SinkAcked) == [SinkAcked([b"thread01"], [at + 1], [True])]
    assert desk.tokenizer.holding().threads == []


async def test_tokens_without_text_give_credit_by_themselves(desk: Desk) -> None:
    await desk.generate(sampling=Sampling(ignore_eos=True))
    at = len(desk.ids_of("the"))
    (h,) = desk.ids_of("h")
    desk.commit((b"thread01", at, h, 0))
    silent = [(b"thread01", at + 1 + n, 1, 0) for n in range(2 * SILENT_TOKENS_MAX)]
    for row in silent[:SILENT_TOKENS_MAX]:
        assert desk.commit(row) == []
    assert desk.kernel.said(SinkAcked) == []  # what was said before them is not read
    desk.tokenizer.stream_acked(acked(1, 1), desk.request())
    (ack,) = desk.kernel.said(SinkAcked)
    assert ack.positions == [at + SILENT_TOKENS_MAX]
    for row in silent[SILENT_TOKENS_MAX:]:
        desk.commit(row)
    (ack,) = desk.kernel.said(SinkAcked)
    assert ack == SinkAcked([b"thread01"], [at + 2 * SILENT_TOKENS_MAX], [False])


# --- after a death --------------------------------------------------------------------------------


async def spawned(desk: Desk, **changes: Any) -> ThreadSpawn:  # Generate's fields
    await desk.generate(**changes)
    return desk.kernel.asked(ThreadSpawn)[-1]


async def again(folder: Path) -> Desk:
    """The next incarnation."""
    made = Desk(folder)
    await made.tokenizer.start()
    return made


async def test_a_thread_goes_on_in_the_next_incarnation(desk: Desk, folder: Path) -> None:
    spawn = await spawned(desk)
    at = len(spawn.tokens) // 4
    before, _ = desk.write(b"thread01", at, "the he abc")
    output = desk.ids_of("the he abc")
    following = await again(folder)
    read = at + 1
    opened = following.opened(spawn, output, acked=read, session=OTHER, tenant=7)
    following.tokenizer.sink_open(opened, following.request(b""))
    (post,) = [post for post in following.kernel.posts if isinstance(post.message, Text)]
    assert post.peer == OTHER
    assert isinstance(post.message, Text)
    whole = joined(before)
    (offset,) = post.message.offsets
    assert 0 < offset < len(whole)
    assert post.message.texts == [whole[offset:]]
    assert following.tokenizer.holding().positions == [at + len(output) - 1]
    following.kernel.posts.clear()
    texts, _ = following.write(b"thread01", at + len(output), "x")
    assert texts[0].offsets == [len(whole)]


async def test_an_end_is_told_again_and_a_lost_stop_too(desk: Desk, folder: Path) -> None:
    spawn = await spawned(desk, stops=["he"])
    output = desk.ids_of("abhex")
    following = await again(folder)
    opened = following.opened(spawn, output, end=END_LENGTH)
    following.tokenizer.sink_open(opened, following.request(b""))
    (text,) = following.kernel.said(Text)
    assert text.texts == ["ab"]
    assert text.ends[0] is not None
    assert text.ends[0].reason == "stop"
    (ended,) = following.kernel.said(ThreadEnd)
    assert ended.at < len(spawn.tokens) // 4 + len(output) - 1


async def test_a_dropped_thread_is_forgotten(desk: Desk) -> None:
    await desk.generate()
    desk.tokenizer.sink_drop(SinkDrop([b"thread01", b"unknown!"]), desk.request(b""))
    assert desk.tokenizer.holding().threads == []
    desk.check()


@pytest.mark.parametrize("gone", ["changed", "deleted"])
async def test_a_thread_whose_tokenizer_is_gone_ends(desk: Desk, folder: Path, gone: str) -> None:
    spawn = await spawned(desk)
    file = folder / "tokenizer.json"
    if gone == "changed":
        file.write_text(file.read_text().replace("two words", "2 words"))
    else:
        file.unlink()
    following = Desk(folder)
    opened = following.opened(spawn, desk.ids_of("ab"))
    request = following.request(b"")
    following.tokenizer.sink_open(opened, request)
    assert following.kernel.said(ThreadCancel) == [ThreadCancel(b"thread01")]
    following.tokenizer.sink_open(msgspec.structs.replace(opened, end=END_CANCEL), request)
    (over,) = following.kernel.said(SinkAcked)
    assert over.ended == [True]
    with pytest.raises(RemoteError) as refused:
        await following.tokenizer.attach(Attach(KEY + b"\0", 0), following.request())
    assert refused.value.kind is ErrorKind.INVALID
    assert str(folder) in refused.value.detail


async def test_a_long_stream_comes_in_messages_that_fit(
    desk: Desk, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spawn = await spawned(desk)
    output = desk.ids_of("日本 the ") * 60_000
    following = await again(folder)
    opened = following.opened(spawn, output, end=END_LENGTH)
    following.tokenizer.sink_open(opened, following.request(b""))
    texts = following.kernel.said(Text)
    assert len(texts) > 1
    for text in texts:
        assert len(wire.encode_body(text)) < limits.MESSAGE_BYTES_MAX - limits.HEADER_BYTES_MAX
    whole = joined(texts)
    assert whole == "日本 the " * 60_000
    assert [text.ends[0] is not None for text in texts] == [False] * (len(texts) - 1) + [True]


# --- readers --------------------------------------------------------------------------------------


async def test_a_reader_gets_what_it_lacks(desk: Desk) -> None:
    await desk.generate()
    at = len(desk.ids_of("the"))
    desk.write(b"thread01", at, "abcdef")
    attach = Attach(KEY + b"\0", 2)
    assert await desk.tokenizer.attach(attach, desk.request()) == Attached(b"thread01", "small", 6)
    (text,) = desk.kernel.said(Text)
    assert (text.offsets, text.texts, text.tokens) == ([2], ["cdef"], [6])
    assert desk.kernel.asked(ThreadAdopt) == []
    await desk.tokenizer.attach(Attach(KEY + b"\0", 6), desk.request())
    assert desk.kernel.said(Text) == []


async def test_another_session_takes_over(desk: Desk) -> None:
    await desk.generate()
    at = len(desk.ids_of("the"))
    desk.write(b"thread01", at, "abc")
    await desk.tokenizer.attach(Attach(KEY + b"\0", 0), desk.request(source=OTHER))
    assert desk.kernel.asked(ThreadAdopt) == [ThreadAdopt(b"thread01")]
    assert desk.kernel.calls[-1].cause == desk.ids.to_bytes(16)
    assert desk.kernel.posts[-1].peer == OTHER
    desk.commit((b"thread01", at + 3, desk.ids_of("h")[0], 0))
    assert desk.tokenizer._streams.by_thread[b"thread01"].session == OTHER


async def test_another_tenant_of_the_same_gateway_is_the_kernel_s_to_judge(desk: Desk) -> None:
    """A gateway reads for many tenants over one session."""
    await desk.generate()
    desk.write(b"thread01", len(desk.ids_of("the")), "secret")
    desk.kernel.refusals[ThreadAdopt] = [Failed(ErrorKind.DENIED, "another tenant's")]
    with pytest.raises(RemoteError) as denied:
        await desk.tokenizer.attach(Attach(KEY + b"\0", 0), desk.request(tenant=2))
    assert denied.value.kind is ErrorKind.DENIED
    assert desk.kernel.said(Text) == []
    # An operator may: and what it reads counts then.
    await desk.tokenizer.attach(Attach(KEY + b"\0", 0), desk.request(tenant=2))
    assert joined(desk.kernel.said(Text)) == "secret"
    desk.tokenizer.stream_acked(acked(6, 6), desk.request(tenant=2))
    assert len(desk.kernel.said(SinkAcked)) == 1


async def test_an_unknown_stream_is_stale(desk: Desk) -> None:
    with pytest.raises(RemoteError) as stale:
        await desk.tokenizer.attach(Attach(b"x" * 17, 0), desk.request())
    assert stale.value.kind is ErrorKind.STALE


async def test_scores_go_with_their_text(desk: Desk) -> None:
    await desk.generate(sampling=Sampling(logprobs=0))
    at = len(desk.ids_of("the"))
    (h,) = desk.ids_of("h")
    (text,) = desk.commit((b"thread01", at, h, 0), scores=[TokenScore(h, -0.5)])
    assert text.scores is not None and text.scores[0] is not None
    assert [(score.token, score.logprob) for score in text.scores[0]] == [(h, -0.5)]


# --- numbers --------------------------------------------------------------------------------------


async def test_measurements(desk: Desk) -> None:
    await desk.generate()
    with pytest.raises(RemoteError):
        await desk.generate(model="none")
    desk.write(b"thread01", len(desk.ids_of("the")), "abc")
    report = desk.tokenizer._metrics()
    counters = {
        sample.name.removeprefix("llmos_tokenizer_"): sample.value for sample in report.counters
    }
    assert counters == {
        "requests_total": 2,
        "refused_total": 1,
        "prompt_tokens_total": len(desk.ids_of("the")),
        "output_tokens_total": 3,
        "output_bytes_total": 3,
    }
    assert [sample.value for sample in report.gauges] == [1]
    assert sum(report.histograms[0].counts) == 1
    await desk.tokenizer.drain()
    assert len(desk.kernel.said(Metrics)) == 2


def test_every_message_has_a_handler(tmp_path: Path) -> None:
    async def handlers() -> set[type[Message]]:
        return set(Tokenizer(Kernel(), built_in=()).handlers())

    assert asyncio.run(handlers()) == {
        *(Committed, StreamAcked, Generate, Attach),
        *(SinkOpen, SinkDrop, TokenizeAsk, ModelAdd),
        *(Encode, Vectors),
    }
