"""Services that run only while somebody asks them."""

import msgspec
from llmkernel.events import SignalChild, Start
from llmkernel.testkit.rig import CONFIG, Peer, Rig
from llmproto import limits
from llmproto.connection import Failed
from llmproto.data import SegmentAsk
from llmproto.errors import ErrorKind
from llmproto.init import Child, Spec
from llmproto.operation import Status, StatusAsk

DATA = Spec(name="data", role="data", module="fake")
ASK = SegmentAsk(plan=b"p" * 32, index=0)


def boot() -> tuple[Rig, Peer]:
    rig = Rig(msgspec.structs.replace(CONFIG, on_demand=(DATA,)))
    rig.tokenizer()
    return rig, rig.client()


def effects(rig: Rig, kind: type) -> list[object]:
    return [e for e in rig.effects if isinstance(e, kind)]


def served(rig: Rig, client: Peer) -> tuple[Child, Peer]:
    """Asked for, started, ready."""
    client.say(ASK, target="data")
    child = rig.fork(rig.starts["data"])
    return child, rig.service(child)


def alive(rig: Rig, ms: int, *peers: Peer, progress: int = 0) -> list[object]:
    signals: list[object] = []
    for _ in range(ms // 250):
        signals += [e for e in rig.wait(250) if isinstance(e, SignalChild)]
        for peer in peers:
            peer.beat(progress)
    return signals


def test_it_starts_when_it_is_first_asked_and_is_not_waited_for() -> None:
    rig, client = boot()
    assert "data" not in rig.starts
    client.say(StatusAsk())
    assert client.the(Status).ready
    client.say(ASK, target="data")
    failed = client.the(Failed)
    assert (failed.kind, failed.retry_after_ms) == (ErrorKind.UNAVAILABLE, 50)
    assert effects(rig, Start) == [Start(DATA, 1)]
    client.say(ASK, target="data")
    assert effects(rig, Start) == []
    data = rig.service(rig.fork(rig.starts["data"]))
    client.say(ASK, target="data")
    assert data.said == [ASK]


def test_idle_it_is_stopped_and_starts_again() -> None:
    rig, client = boot()
    child, data = served(rig, client)
    assert alive(rig, limits.SERVICE_IDLE_MS, client, data) == []
    assert alive(rig, 1000, client, data) == [SignalChild(child.pid, 1, 15)]
    client.say(ASK, target="data")
    rig.exited(child, code=0)
    assert effects(rig, Start) == []
    client.say(ASK, target="data")
    assert effects(rig, Start) == [Start(DATA, 1)]


def test_who_holds_a_request_or_moves_is_not_idle() -> None:
    rig, client = boot()
    _, data = served(rig, client)
    client.say(ASK, target="data")
    assert alive(rig, 2 * limits.SERVICE_IDLE_MS, client, data) == []
    client.say(ASK, target="data")
    header, _ = data.heard[0]
    data.say(Failed(ErrorKind.INVALID, "no"), reply_to=header.id)
    for progress in range(1, 4):
        assert alive(rig, limits.SERVICE_IDLE_MS - 1000, client, data, progress=progress) == []


def test_killed_it_comes_back_and_the_next_kernel_keeps_it() -> None:
    rig, client = boot()
    child, _ = served(rig, client)
    rig.exited(child, signal=9)
    assert effects(rig, Start) == [Start(DATA, 2)]
    child = rig.fork(rig.starts["data"])
    rig.restart(children=(rig.tokenizer_child, child))
    assert effects(rig, SignalChild) == []
    rig.exited(child, signal=9)
    assert effects(rig, Start) == [Start(DATA, 3)]
