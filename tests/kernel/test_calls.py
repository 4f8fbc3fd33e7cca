"""What may be asked of the kernel: looking, keys and tenants, models, signals."""

import hashlib

import msgspec
import pytest
from llmkernel import calls
from llmkernel.events import JournalRoom
from llmkernel.testkit.rig import CONFIG, MODEL, SERVICE_PROOF, Peer, Rig, spawn_of
from llmproto import limits, wire
from llmproto.base import Message
from llmproto.connection import Beat, Failed
from llmproto.errors import ErrorKind
from llmproto.execution import Stepped
from llmproto.generation import Generate
from llmproto.models import (
    ModelAsk,
    ModelFound,
    ModelLoad,
    ModelRegister,
    ModelRemove,
    Models,
    ModelsAsk,
    ModelState,
)
from llmproto.operation import (
    Note,
    Processes,
    ProcessesAsk,
    ProcessStarted,
    Status,
    StatusAsk,
    Threads,
    ThreadsAsk,
    ThreadState,
)
from llmproto.tenants import KeyAdd, KeyPresent, KeyPresented, KeyRemove, Keys, KeysAsk
from llmproto.threads import (
    Done,
    SinkDrop,
    ThreadAdopt,
    ThreadCancel,
    ThreadRenice,
    ThreadResume,
    ThreadSpawned,
    ThreadSuspend,
)

SECRET = b"s" * 32


def boot() -> tuple[Rig, Peer, Peer]:
    rig = Rig()
    tokenizer = rig.tokenizer()
    return rig, rig.client(), tokenizer


def gateway(rig: Rig) -> Peer:
    peer = rig.peer("gateway")
    peer.hello(SERVICE_PROOF)
    peer.say(ProcessStarted("http://127.0.0.1:1"))
    return peer


def refusal(answers: list[Message]) -> tuple[ErrorKind, str]:
    (failed,) = answers
    assert isinstance(failed, Failed), failed
    return failed.kind, failed.detail


def add_key(client: Peer, name: str = "alice", secret: bytes = SECRET) -> None:
    assert client.say(KeyAdd(name, hashlib.sha256(secret).digest())) == [Done()]


# --- keys and tenants -----------------------------------------------------------------------------


def test_a_key_gives_a_handle_that_is_good_for_its_gateway_only() -> None:
    rig, client, tokenizer = boot()
    add_key(client)
    first, second = gateway(rig), gateway(rig)
    assert first.say(KeyPresent(SECRET)) == [KeyPresented(2, "alice", False)]
    assert first.say(KeyPresent(SECRET)) == [KeyPresented(2, "alice", False)]
    generate = Generate(key=b"k" * 16, prompt="x")
    assert refusal(second.say(generate, target="tokenizer", tenant=2))[0] is ErrorKind.STALE
    first.say(generate, target="tokenizer", tenant=2)
    ((header, _),) = tokenizer.heard
    assert rig.kernel.tables.state.tenants[header.tenant or 0] == "key:alice"


def test_a_removed_key_ends_its_handles_until_it_is_presented_again() -> None:
    rig, client, tokenizer = boot()
    add_key(client)
    peer = gateway(rig)
    peer.say(KeyPresent(SECRET))
    assert client.say(KeyRemove("alice")) == [Done()]
    generate = Generate(key=b"k" * 16, prompt="x")
    assert refusal(peer.say(generate, target="tokenizer", tenant=2))[0] is ErrorKind.STALE
    assert refusal(peer.say(KeyPresent(SECRET)))[0] is ErrorKind.DENIED
    add_key(client)
    assert peer.say(KeyPresent(SECRET)) == [KeyPresented(2, "alice", False)]
    assert tokenizer.heard == []


def test_keys_are_listed_without_their_secrets_and_refused_twice() -> None:
    rig, client, _ = boot()
    add_key(client)
    add_key(client)
    other = KeyAdd("alice", b"o" * 32)
    assert refusal(client.say(other))[0] is ErrorKind.INVALID
    same = KeyAdd("bob", hashlib.sha256(SECRET).digest())
    assert refusal(client.say(same)) == (
        ErrorKind.INVALID,
        "this key exists already, under the name 'alice'",
    )
    assert refusal(client.say(KeyAdd("x" * 253, b"o" * 32)))[0] is ErrorKind.INVALID
    (keys,) = client.say(KeysAsk())
    assert isinstance(keys, Keys) and [row.name for row in keys.rows] == ["alice"]
    assert refusal(client.say(KeyRemove("nobody")))[0] is ErrorKind.STALE
    assert rig.replayed().digest() == rig.kernel.tables.state.digest()


def test_keys_and_tenants_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    rig, client, _ = boot()
    monkeypatch.setattr(limits, "API_KEYS_MAX", 1)
    add_key(client)
    assert refusal(client.say(KeyAdd("b", b"b" * 32)))[0] is ErrorKind.EXHAUSTED
    monkeypatch.setattr(limits, "TENANTS_MAX", 1)
    assert refusal(gateway(rig).say(KeyPresent(SECRET)))[0] is ErrorKind.EXHAUSTED


def test_while_the_disk_is_full_only_what_can_wait_is_refused() -> None:
    rig, client, tokenizer = boot()
    thread = rig.spawn(client, tokenizer)
    rig.handle(JournalRoom(False))
    for message in (
        KeyAdd("a", b"a" * 32),
        ThreadSuspend(thread),
        ThreadResume(thread),
        ThreadRenice(thread, 1),
    ):
        assert refusal(client.say(message))[0] is ErrorKind.EXHAUSTED
    new = msgspec.structs.replace(MODEL, name="o")
    assert refusal(tokenizer.say(ModelRegister(new)))[0] is ErrorKind.EXHAUSTED
    assert tokenizer.say(ModelRegister(MODEL, default=True)) == [Done()]
    assert client.say(ThreadCancel(thread)) == [Done()]


# --- threads --------------------------------------------------------------------------------------


def test_threads_of_other_tenants_are_neither_seen_nor_touched() -> None:
    rig, client, tokenizer = boot()
    add_key(client)
    peer = gateway(rig)
    peer.say(KeyPresent(SECRET))
    mine = rig.spawn(client, tokenizer)
    peer.say(Generate(key=b"k" * 16, prompt="x"), target="tokenizer", tenant=2)
    ((header, _),) = tokenizer.heard
    tokenizer.say(spawn_of(b"k" * 16), cause=header.id)
    theirs = tokenizer.the(ThreadSpawned).thread
    assert theirs != mine  # the same request key, of another tenant
    (rows,) = peer.say(ThreadsAsk(), tenant=2)
    assert isinstance(rows, Threads)
    assert [(row.thread, row.tenant) for row in rows.rows] == [(theirs, "key:alice")]
    assert refusal(peer.say(ThreadCancel(mine), tenant=2))[0] is ErrorKind.DENIED
    (rows,) = client.say(ThreadsAsk(limit=1))
    assert isinstance(rows, Threads) and (len(rows.rows), rows.total) == (1, 2)
    assert client.say(ThreadCancel(theirs)) == [Done()]


def test_what_is_cancelled_to_be_forgotten_is_gone_when_that_is_answered() -> None:
    rig, client, tokenizer = boot()
    thread = rig.spawn(client, tokenizer)
    tokenizer.heard.clear()
    assert client.say(ThreadCancel(thread, forget=True)) == [Done()]
    assert not rig.kernel.tables.state.threads
    assert [message for _, message in tokenizer.heard][-1] == SinkDrop([thread])
    assert refusal(client.say(ThreadCancel(thread, forget=True)))[0] is ErrorKind.STALE


def test_a_list_of_threads_fits_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "ROWS_BYTES_MAX", 20_000)
    rig, client, tokenizer = boot()
    long = msgspec.structs.replace(MODEL, name="é" * 256)
    tokenizer.say(ModelRegister(long))
    for number in range(30):
        rig.spawn(client, tokenizer, number.to_bytes(16), model=long.name)
    (rows,) = client.say(ThreadsAsk(limit=2048))
    assert isinstance(rows, Threads)
    assert rows.total == 30 > len(rows.rows) > 10
    assert len(wire.encode_body(rows)) < 20_000


def test_renice_moves_what_waits() -> None:
    rig, client, tokenizer = boot()
    first = rig.spawn(client, tokenizer, b"1" * 16)
    second = rig.spawn(client, tokenizer, b"2" * 16)
    assert client.say(ThreadRenice(second, 3, 0)) == [Done()]
    queue = rig.kernel.tables.queue
    assert [thread.id for thread in queue.all_waiting("m")] == [second, first]
    assert rig.replayed().threads.by_id[second].service_class == 0


def test_a_stream_is_adopted_for_the_client_whose_attach_is_cited() -> None:
    rig, client, tokenizer = boot()
    thread = rig.spawn(client, tokenizer)
    other = rig.client()
    assert refusal(tokenizer.say(ThreadAdopt(thread), cause=b"?" * 16))[0] is ErrorKind.STALE
    cause = rig.ask(other, tokenizer)
    assert refusal(tokenizer.say(ThreadAdopt(b"?" * 8), cause=cause))[0] is ErrorKind.STALE
    assert tokenizer.say(ThreadAdopt(thread), cause=cause) == [Done()]
    assert rig.thread(thread).session == other.session
    add_key(client)
    peer = gateway(rig)
    peer.say(KeyPresent(SECRET))
    peer.say(Generate(key=b"k" * 16, prompt="x"), target="tokenizer", tenant=2)
    ((header, _),) = tokenizer.heard
    denied = tokenizer.say(ThreadAdopt(thread), cause=header.id)
    assert refusal(denied)[0] is ErrorKind.DENIED


# --- models ---------------------------------------------------------------------------------------


def test_models_are_found_listed_loaded_and_removed() -> None:
    rig, client, _ = boot()
    found = client.say(ModelAsk())
    assert isinstance(found[0], ModelFound) and found[0].model.name == "m"
    kind, detail = refusal(client.say(ModelAsk("x")))
    assert kind is ErrorKind.INVALID and "'x'" in detail and detail.endswith("m")
    assert client.say(ModelLoad()) == [Done()]
    (models,) = client.say(ModelsAsk())
    assert isinstance(models, Models)
    assert [(row.state, row.default) for row in models.rows] == [(ModelState.LOADING, True)]
    rig.executor()
    (models,) = client.say(ModelsAsk())
    assert isinstance(models, Models) and models.rows[0].state is ModelState.READY
    assert client.say(ModelRemove("m")) == [Done()]
    assert refusal(client.say(ModelAsk()))[1].startswith("there is no default model")


def test_a_model_is_added_only_for_an_operator() -> None:
    rig, client, tokenizer = boot()
    add_key(client)
    peer = gateway(rig)
    peer.say(KeyPresent(SECRET))
    new = ModelRegister(msgspec.structs.replace(MODEL, name="o"))
    peer.say(Generate(key=b"k" * 16, prompt="x"), target="tokenizer", tenant=2)
    ((header, _),) = tokenizer.heard
    assert refusal(tokenizer.say(new, cause=header.id))[0] is ErrorKind.DENIED
    assert refusal(tokenizer.say(new, cause=b"?" * 16))[0] is ErrorKind.UNAVAILABLE
    assert tokenizer.say(new, cause=rig.ask(client, tokenizer)) == [Done()]
    again = rig.kernel.tables.state.models["o"]
    assert tokenizer.say(new) == [Done()]
    assert rig.kernel.tables.state.models["o"] == again


def test_models_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, tokenizer = boot()
    monkeypatch.setattr(limits, "MODELS_MAX", 1)
    new = ModelRegister(msgspec.structs.replace(MODEL, name="o"))
    assert refusal(tokenizer.say(new))[0] is ErrorKind.EXHAUSTED


def test_the_configured_models_are_loaded_at_boot_and_when_they_appear() -> None:
    rig = Rig(config=msgspec.structs.replace(CONFIG, default_model="m", preload=("m", "later")))
    rig.tokenizer()
    assert rig.starts["executor-1"].spec.arguments[1] == "m"
    status = rig.client().say(StatusAsk())[0]
    assert isinstance(status, Status)
    assert status.not_ready == ["model m: loading", "model later: loading"]
    rig.starts.clear()
    rig.restart()
    assert rig.starts["executor-1"].spec.arguments[1] == "m"


# --- looking --------------------------------------------------------------------------------------


def test_ps_and_status() -> None:
    rig, client, tokenizer = boot()
    rig.spawn(client, tokenizer)
    executor = rig.executor()
    peer = gateway(rig)
    (rows,) = client.say(ProcessesAsk())
    assert isinstance(rows, Processes)
    assert [(row.role, row.threads, row.model) for row in rows.rows] == [
        ("init", 0, ""),
        ("kernel", 0, ""),
        ("tokenizer", 0, ""),
        ("executor", 1, "m"),
        ("gateway", 0, ""),
    ]
    assert rows.rows[3].lease is not None
    paths = {row.role: row.path for row in rows.rows if row.path}
    assert paths == {"executor": "float32 cpu torch exact"}
    (models,) = client.say(ModelsAsk())
    assert isinstance(models, Models) and models.rows[0].path == paths["executor"]
    (status,) = client.say(StatusAsk())
    assert isinstance(status, Status)
    assert (status.ready, status.threads_running, status.http) == (True, 1, "http://127.0.0.1:1")
    assert status.devices[0].memory_granted_bytes == 2 << 20
    assert peer.say(Note("hello")) == [Done()]
    assert peer.say(Beat()) == []
    assert executor.say(Stepped([], [], [], [], [], 5)) == []


def test_suspended_threads_are_counted_by_nobody_as_running() -> None:
    rig, client, tokenizer = boot()
    thread = rig.spawn(client, tokenizer)
    client.say(ThreadSuspend(thread))
    client.say(ThreadSuspend(thread))
    assert rig.thread(thread).state is ThreadState.SUSPENDED
    client.say(ThreadResume(thread))
    client.say(ThreadResume(thread))
    assert rig.thread(thread).state is ThreadState.QUEUED
