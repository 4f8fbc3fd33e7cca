"""Who calls: answers are remembered for moments, and presented again to a new kernel."""

import asyncio

import pytest
from libllm.events import Call, Event
from libllm.port import Port
from llmproto.errors import RemoteError
from llmproto.rights import Right
from llmproto.tenants import KeyPresent, KeyPresented
from llmservices.gateway import keys as keys_module
from llmservices.gateway.errors import HttpError
from llmservices.gateway.keys import UNKNOWN_MAX, Keys

from .conftest import FakeLlm

GOOD = "Bearer good"


async def test_a_key_is_presented_once_in_a_while() -> None:
    llm = FakeLlm()
    keys = Keys(llm, required=True)
    for _ in range(3):
        assert (await keys.caller(GOOD, Right.USE)).tenant == 5
    assert llm.presented == [b"good"]


@pytest.mark.parametrize("authorization", [None, "", "Bearer", "Basic good", "Bearer " + "x" * 257])
async def test_no_key(authorization: str | None) -> None:
    with pytest.raises(HttpError) as caught:
        await Keys(FakeLlm(), required=True).caller(authorization, Right.USE)
    assert caught.value.status == 401
    assert (await Keys(FakeLlm(), required=False).caller(authorization, Right.USE)).tenant is None


async def test_an_unknown_key_is_asked_for_once_and_never_quoted() -> None:
    llm = FakeLlm()
    keys = Keys(llm, required=True)
    for _ in range(2):
        with pytest.raises(HttpError) as caught:
            await keys.caller("Bearer s3cret", Right.USE)
        assert "s3cret" not in str(caught.value)
    assert llm.presented == [b"s3cret"]


async def test_unknown_keys_are_bounded() -> None:
    keys = Keys(FakeLlm(), required=False)
    for number in range(UNKNOWN_MAX + 5):
        await keys.caller(f"Bearer {number}", Right.USE)
    keys.check()


async def test_a_removed_key_stops_working(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys_module, "FRESH_NS", 0)
    llm = FakeLlm()
    keys = Keys(llm, required=True)
    await keys.caller(GOOD, Right.USE)
    llm.keys.clear()
    with pytest.raises(HttpError):
        await keys.caller(GOOD, Right.USE)
    keys.check()


async def test_rights_of_an_operator() -> None:
    llm = FakeLlm()
    keys = Keys(llm, required=True)
    with pytest.raises(HttpError) as caught:
        await keys.caller(GOOD, Right.OPERATE)
    assert caught.value.status == 403
    llm.keys[b"root"] = KeyPresented(6, "root", True)
    assert (await keys.caller("Bearer root", Right.OPERATE)).tenant == 6


async def test_a_kernel_that_is_down_is_no_verdict() -> None:
    llm = FakeLlm()
    llm.down.add(KeyPresent)
    with pytest.raises(RemoteError):
        await Keys(llm, required=False).caller(GOOD, Right.USE)


async def test_keys_in_use_are_presented_to_a_new_kernel() -> None:
    fed: list[Event] = []
    llm = FakeLlm()
    llm.keys[b"idle"] = KeyPresented(6, "idle", False)
    keys = Keys(llm, required=True)
    await keys.caller("Bearer idle", Right.USE)
    port = Port(fed.append)
    caller = await keys.caller(GOOD, Right.USE)
    with keys.holding(caller):
        keys.welcomed(port)
        await asyncio.sleep(0)
    assert [event.message for event in fed if isinstance(event, Call)] == [KeyPresent(b"good")]
