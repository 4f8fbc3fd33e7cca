"""Greetings, rights, requests to services and their answers."""

from typing import Any

import msgspec
import pytest
from llmkernel.events import Arrived, Forward, PeerLost, Send
from llmkernel.testkit.rig import (
    CONFIG,
    MODEL,
    MS,
    OPERATOR_PROOF,
    SERVICE_PROOF,
    TOKENIZER,
    Peer,
    Rig,
    numbered,
)
from llmproto import limits, wire
from llmproto.base import Header, Message
from llmproto.connection import Beat, Failed, Goodbye, Hello, Unknown, Welcome
from llmproto.errors import ErrorKind
from llmproto.execution import ExecutorReady, Stepped
from llmproto.generation import Accepted, Generate, Text
from llmproto.init import Spec
from llmproto.kinds import KIND_OF, KINDS
from llmproto.metrics import MetricsAsk
from llmproto.models import ModelAdd, ModelRegister
from llmproto.operation import ProcessStarted, Shutdown, StatusAsk
from llmproto.rights import KIND_RIGHTS, ROLES, Right
from llmproto.threads import Done

GENERATE = Generate(key=b"k" * 16, prompt="x")


def boot() -> tuple[Rig, Peer, Peer]:
    rig = Rig()
    tokenizer = rig.tokenizer()
    return rig, rig.client(), tokenizer


def refusal(answers: list[Message]) -> ErrorKind:
    (failed,) = answers
    assert isinstance(failed, Failed), failed
    return failed.kind


# --- greeting -------------------------------------------------------------------------------------


def test_a_client_with_the_key_is_welcomed() -> None:
    rig = Rig()
    peer = rig.peer("client")
    assert peer.hello(OPERATOR_PROOF) == Welcome(
        1, b"b" * 16, limits.PROTOCOL_VERSION, limits.BEAT_MS, peer.session, 1
    )


@pytest.mark.parametrize(
    ("role", "proof"),
    [
        ("client", b""),
        ("client", SERVICE_PROOF),
        ("echo", b""),
        ("echo", OPERATOR_PROOF),
        ("operator", SERVICE_PROOF),
        ("kernel", SERVICE_PROOF),
        ("init", SERVICE_PROOF),
    ],
)
def test_a_wrong_proof_or_role_is_denied(role: str, proof: bytes) -> None:
    rig = Rig()
    peer = rig.peer(role)
    assert refusal([peer.hello(proof)]) is ErrorKind.DENIED
    assert not rig.kernel.tables.sessions.by_id


def test_without_a_configured_key_nobody_is_welcomed() -> None:
    rig = Rig(config=type(CONFIG)())
    assert refusal([rig.peer("client").hello(b"")]) is ErrorKind.DENIED


def test_a_process_proves_itself_with_its_own_key() -> None:
    rig = Rig()
    rig.tokenizer()
    child = rig.tokenizer_child
    impostor = rig.peer("tokenizer")
    assert refusal([impostor.hello(b"x", process="tokenizer", incarnation=1)]) is ErrorKind.DENIED
    late = rig.peer("tokenizer")
    answer = late.hello(child.proof, process="tokenizer", incarnation=0)
    assert refusal([answer]) is ErrorKind.DENIED
    other = rig.peer("gateway")
    answer = other.hello(child.proof, process="tokenizer", incarnation=1)
    assert refusal([answer]) is ErrorKind.DENIED


def test_other_protocols_are_invalid() -> None:
    peer = Rig().peer("client")
    hello = Hello(peer.session, "client", OPERATOR_PROOF, protocol_min=2, protocol_max=9)
    assert refusal(peer.say(hello)) is ErrorKind.INVALID


def test_strangers_are_told_to_say_hello() -> None:
    peer = Rig().peer("client")
    assert peer.say(StatusAsk()) == [Unknown(1)]
    peer.rig.handle(Arrived(peer.peer, (b"garbage", b"")))
    assert peer.said == [Unknown(1)]
    header = Header(limits.PROTOCOL_VERSION, KIND_OF[Hello], b"i" * 16)
    peer.rig.handle(Arrived(peer.peer, (wire.encode_header(header), b"\xc1")))
    assert peer.said == [Unknown(1)]


def test_garbage_from_a_welcomed_peer_is_invalid() -> None:
    _, client, _ = boot()
    client.rig.handle(Arrived(client.peer, (b"garbage", b"")))
    assert refusal(client.said) is ErrorKind.INVALID
    header = Header(limits.PROTOCOL_VERSION, KIND_OF[StatusAsk], b"i" * 16)
    client.rig.handle(Arrived(client.peer, (wire.encode_header(header), b"\xc1")))
    assert refusal(client.said) is ErrorKind.INVALID


def test_a_session_keeps_its_place_over_a_new_connection() -> None:
    rig, client, _ = boot()
    again = Peer(rig, b"another", client.session, "client")
    assert isinstance(again.hello(OPERATOR_PROOF), Welcome)
    assert client.say(StatusAsk()) == [Unknown(1)]
    assert len(rig.kernel.tables.sessions.by_id) == 2


def test_a_connection_that_changes_its_session_ends_the_old_one() -> None:
    rig, client, _ = boot()
    thread_reader = Peer(rig, client.peer, numbered(77), "client")
    assert isinstance(thread_reader.hello(OPERATOR_PROOF), Welcome)
    assert client.session not in rig.kernel.tables.sessions.by_id


def test_a_session_of_another_role_is_denied() -> None:
    rig, client, _ = boot()
    thief = Peer(rig, b"thief", client.session, "echo")
    assert refusal([thief.hello(SERVICE_PROOF)]) is ErrorKind.DENIED
    assert isinstance(client.say(StatusAsk())[0], Message)


def test_sessions_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "SESSIONS_MAX", 2)
    rig, _, _ = boot()
    assert refusal([rig.peer("client").hello(OPERATOR_PROOF)]) is ErrorKind.EXHAUSTED


def test_external_services_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "PROCESSES_MAX", 2)
    rig = Rig()
    first = rig.peer("echo")
    assert isinstance(first.hello(SERVICE_PROOF), Welcome)
    assert refusal([rig.peer("echo").hello(SERVICE_PROOF)]) is ErrorKind.EXHAUSTED
    assert isinstance(first.hello(SERVICE_PROOF), Welcome)
    first.say(Goodbye())
    assert isinstance(rig.peer("echo").hello(SERVICE_PROOF), Welcome)


def test_an_external_executor_that_lapses_gives_its_threads_back() -> None:
    rig, client, tokenizer = boot()
    thread = rig.spawn(client, tokenizer)
    executor = rig.peer("executor")
    executor.hello(SERVICE_PROOF)
    executor.beat()
    executor.say(ExecutorReady("m", b"m" * 16, 2048, 100, 16, 8))
    assert rig.thread(thread).process is not None
    executor.hello(SERVICE_PROOF)
    executor.beat()
    executor.say(ExecutorReady("m", b"m" * 16, 2048, 100, 16, 8))
    assert rig.thread(thread).residencies == 2
    for _ in range(6):
        rig.wait(500)
        client.beat()
        tokenizer.beat()
    assert rig.thread(thread).process is None


def test_a_lost_peer_is_sent_nothing_until_it_speaks() -> None:
    rig, client, tokenizer = boot()
    thread = rig.spawn(client, tokenizer)
    rig.handle(PeerLost(tokenizer.peer))
    executor = rig.executor()
    run = rig.thread(thread)
    assert run.residency is not None
    executor.say(Stepped([thread], [run.residency], [3], [7], [0], 10))
    assert tokenizer.said == []
    tokenizer.beat()
    executor.say(Stepped([thread], [run.residency], [4], [7], [0], 10))
    assert len(tokenizer.said) == 1


# --- rights ---------------------------------------------------------------------------------------


def test_every_role_may_say_what_the_table_allows_and_nothing_else() -> None:
    for role, rights in ROLES.items():
        if role == "operator":
            continue
        rig = Rig()
        peer = rig.client() if role == "client" else rig.peer(role)
        if role != "client":
            peer.hello(SERVICE_PROOF)
            rights = rights - {Right.OPERATE}  # only for one that init started
        else:
            rights = rights | ROLES["operator"]
        for number, kind in KINDS.items():
            if kind is Hello or kind is Goodbye or kind is Shutdown:
                continue
            header = Header(limits.PROTOCOL_VERSION, number, numbered(number))
            rig.handle(Arrived(peer.peer, (wire.encode_header(header), b"\x80")))
            denied = [m for m in peer.said if isinstance(m, Failed) and m.kind is ErrorKind.DENIED]
            allowed = KIND_RIGHTS.get(kind, frozenset()) & rights
            assert bool(denied) == (not allowed), (role, kind.__name__, peer.said)


def test_a_store_that_init_started_is_an_operator_and_no_other() -> None:
    spec = Spec(name="store", role="store", module="fake")
    rig = Rig(msgspec.structs.replace(CONFIG, services=(TOKENIZER, spec)))
    tokenizer = rig.tokenizer()
    store = rig.service(rig.fork(rig.starts["store"]))
    store.say(ModelAdd("/models/small", "small"), target="tokenizer")
    ((header, asked),) = tokenizer.heard
    assert isinstance(asked, ModelAdd)
    tokenizer.say(ModelRegister(msgspec.structs.replace(MODEL, name="small")), cause=header.id)
    assert tokenizer.said == [Done()]
    other = rig.peer("store")
    other.hello(SERVICE_PROOF)
    other.say(ModelAdd("/models/evil", "evil"), target="tokenizer")
    assert refusal(other.said) is ErrorKind.DENIED


def test_an_unknown_kind_is_invalid_and_a_plugins_kind_passes() -> None:
    rig, client, _ = boot()
    header = Header(limits.PROTOCOL_VERSION, 0x0FFF, numbered(1), target="echo")
    rig.handle(Arrived(client.peer, (wire.encode_header(header), b"")))
    assert refusal(client.said) is ErrorKind.INVALID
    echo = rig.peer("echo")
    echo.hello(SERVICE_PROOF)
    echo.say(ProcessStarted())
    header = Header(limits.PROTOCOL_VERSION, 0x8001, numbered(2), target="echo")
    rig.handle(Arrived(client.peer, (wire.encode_header(header), b"anything")))
    assert [e.body for e in rig.effects if not isinstance(e, Send) and hasattr(e, "body")] == [
        (b"anything",)
    ]


def plugin_frames(number: int, **fields: Any) -> tuple[bytes, ...]:  # Any: the header's fields
    """A message of a plug-in kind, with a body that nobody can decode and one blob."""
    header = Header(limits.PROTOCOL_VERSION, 0x8001, numbered(number), blobs=[2], **fields)
    return (wire.encode_header(header), b"\xc1", b"ab")


def forwarded(rig: Rig) -> list[tuple[bytes, bytes, tuple[bytes, ...]]]:
    """(connection, the sender's session, body and blobs) of what the last event passed on."""
    return [(e.peer, e.header.source, e.body) for e in rig.effects if isinstance(e, Forward)]


def test_a_plugin_is_asked_and_answers_in_its_own_kinds_with_blobs() -> None:
    rig, client, _ = boot()
    echo = rig.peer("echo")
    echo.hello(SERVICE_PROOF)
    echo.say(ProcessStarted())
    rig.handle(Arrived(client.peer, plugin_frames(1, target="echo")))
    assert forwarded(rig) == [(echo.peer, client.session, (b"\xc1", b"ab"))]
    rig.handle(Arrived(echo.peer, plugin_frames(2, peer=client.session, reply_to=numbered(1))))
    assert forwarded(rig) == [(client.peer, echo.session, (b"\xc1", b"ab"))]
    rig.handle(Arrived(echo.peer, plugin_frames(3, peer=client.session)))
    assert forwarded(rig) == [(client.peer, echo.session, (b"\xc1", b"ab"))]
    rig.handle(Arrived(client.peer, plugin_frames(4, peer=echo.session)))
    assert forwarded(rig) == [(echo.peer, client.session, (b"\xc1", b"ab"))]


def test_a_plugins_kinds_reach_nobody_who_is_none() -> None:
    rig, client, tokenizer = boot()
    echo = rig.peer("echo")
    echo.hello(SERVICE_PROOF)
    echo.say(ProcessStarted())
    for number, sender in enumerate((client, echo)):
        for place in ({"target": "tokenizer"}, {"peer": tokenizer.session}, {"target": "kernel"}):
            rig.handle(Arrived(sender.peer, plugin_frames(10 + number, **place)))
            assert refusal(sender.said) is ErrorKind.INVALID
        rig.handle(Arrived(sender.peer, plugin_frames(20 + number, peer=numbered(99))))
        assert not rig.effects
    # Nor do the answers of one that is no plug-in, or what it says by itself, carry them.
    request = rig.ask(client, tokenizer)
    rig.handle(Arrived(tokenizer.peer, plugin_frames(30, peer=client.session, reply_to=request)))
    assert not forwarded(rig)
    rig.handle(Arrived(tokenizer.peer, plugin_frames(31, peer=client.session)))
    assert not forwarded(rig)


def test_a_plugin_that_dies_leaves_its_requests_unavailable_and_its_name_too() -> None:
    rig, client, _ = boot()
    echo = rig.peer("echo")
    echo.hello(SERVICE_PROOF)
    echo.say(ProcessStarted())
    rig.handle(Arrived(client.peer, plugin_frames(1, target="echo")))
    echo.say(Goodbye())
    ((header, failed),) = client.heard
    assert (header.reply_to, refusal([failed])) == (numbered(1), ErrorKind.UNAVAILABLE)
    rig.handle(Arrived(client.peer, plugin_frames(1, target="echo")))
    assert refusal(client.said) is ErrorKind.UNAVAILABLE


def test_what_is_not_for_the_kernel_is_invalid() -> None:
    _, client, _ = boot()
    assert refusal(client.say(GENERATE)) is ErrorKind.INVALID


# --- requests -------------------------------------------------------------------------------------


def test_an_answer_finds_its_requester_once() -> None:
    rig, client, tokenizer = boot()
    request = rig.ask(client, tokenizer)
    accepted = Accepted([b"t" * 8], "m", 3)
    tokenizer.say(accepted, reply_to=request)
    ((header, message),) = client.heard
    assert (message, header.reply_to, header.source) == (accepted, request, tokenizer.session)
    tokenizer.say(accepted, reply_to=request)
    assert client.heard == []


def test_nobody_else_can_answer() -> None:
    rig, client, tokenizer = boot()
    request = rig.ask(client, tokenizer)
    other = rig.peer("tokenizer")
    other.hello(SERVICE_PROOF)
    other.say(ProcessStarted())
    other.say(Accepted([b"t" * 8], "m", 3), reply_to=request)
    assert client.heard == []


def test_a_message_id_of_somebody_else_is_refused() -> None:
    rig, client, tokenizer = boot()
    request = rig.ask(client, tokenizer)
    other = rig.client()
    assert refusal(other.say(GENERATE, target="tokenizer", id=request)) is ErrorKind.INVALID


def test_a_repeated_request_is_passed_on_again() -> None:
    rig, client, tokenizer = boot()
    request = rig.ask(client, tokenizer)
    client.say(GENERATE, target="tokenizer", id=request)
    assert len(tokenizer.heard) == 1
    assert len(rig.kernel.tables.sessions.requests) == 1


def test_requests_in_flight_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "REQUESTS_IN_FLIGHT_MAX", 1)
    rig, client, tokenizer = boot()
    rig.ask(client, tokenizer)
    assert refusal(client.say(GENERATE, target="tokenizer")) is ErrorKind.EXHAUSTED


def test_unknown_and_unready_services() -> None:
    rig = Rig()
    client = rig.client()
    assert refusal(client.say(GENERATE, target="nobody")) is ErrorKind.UNAVAILABLE
    assert refusal(client.say(GENERATE, target="monitor")) is ErrorKind.INVALID
    assert refusal(client.say(GENERATE, target="tokenizer")) is ErrorKind.UNAVAILABLE


def test_requests_of_a_dead_service_are_unavailable() -> None:
    rig, client, tokenizer = boot()
    request = rig.ask(client, tokenizer)
    rig.exited(rig.tokenizer_child, signal=9)
    ((header, message),) = client.heard
    assert header.reply_to == request
    assert refusal([message]) is ErrorKind.UNAVAILABLE


def test_requests_of_a_dead_client_are_forgotten() -> None:
    rig, client, tokenizer = boot()
    rig.ask(client, tokenizer)
    client.say(Goodbye())
    assert not rig.kernel.tables.sessions.requests


def test_a_request_that_kills_its_service_is_refused_and_its_neighbours_are_not() -> None:
    rig, client, tokenizer = boot()
    guilty, innocent = numbered(501), numbered(502)
    client.say(GENERATE, target="tokenizer", id=guilty)
    client.say(GENERATE, target="tokenizer", id=innocent)
    deaths = 0
    for _ in range(6):
        rig.exited(rig.tokenizer_child, signal=11)
        deaths += 1
        rig.wait(limits.BACKOFF_MS_MAX)
        client.beat()
        rig.tokenizer_child = rig.fork(rig.starts["tokenizer"])
        tokenizer = rig.service(rig.tokenizer_child)
        if refusal_of(client, guilty) is ErrorKind.INTERNAL:
            break
        assert len(tokenizer.heard) <= 1
    assert deaths <= 1 + limits.STRIKES_MAX
    assert refusal_of(client, guilty) is ErrorKind.INTERNAL
    client.say(GENERATE, target="tokenizer", id=innocent)
    assert [header.id for header, _ in tokenizer.heard] == [innocent]


def refusal_of(client: Peer, request: bytes) -> ErrorKind | None:
    answers = client.say(GENERATE, target="tokenizer", id=request)
    return refusal(answers) if answers else None


def test_text_goes_from_service_to_session_and_clients_do_not_reach_each_other() -> None:
    rig, client, tokenizer = boot()
    text = Text([b"s" * 17], [0], ["x"], [1], [None])
    tokenizer.say(text, target="client", peer=client.session)
    assert client.said == [text]
    other = rig.client()
    client.say(MetricsAsk(), target="client", peer=other.session)
    assert other.said == []


def test_a_session_without_beats_lapses() -> None:
    rig, client, _ = boot()
    rig.wait(limits.SESSION_LEASE_MS)
    assert client.session in rig.kernel.tables.sessions.by_id
    rig.wait(500)
    assert client.session not in rig.kernel.tables.sessions.by_id
    assert client.say(Beat()) == [Unknown(1)]


def test_a_gap_in_the_kernels_own_clock_excuses_everybody() -> None:
    rig, client, _ = boot()
    rig.wait(250)
    rig.now_ns += 60_000 * MS
    rig.wait(250)
    assert client.session in rig.kernel.tables.sessions.by_id
    assert Right.USE in rig.kernel.tables.sessions.by_id[client.session].rights
