"""The table of kinds is complete, and every message says what the schema's rules ask for."""

from typing import get_args

import pytest
from llmproto import init
from llmproto.base import Message
from llmproto.kinds import KIND_OF, KINDS, PLUGIN_KIND_FIRST
from llmproto.render import CONVERSATIONS, prose_of

HOT = {"Run", "Stepped", "Committed", "Text"}


def test_kinds_and_messages_are_one_to_one() -> None:
    assert len(KIND_OF) == len(KINDS)
    assert list(KINDS) == sorted(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_lies_in_the_range_of_its_conversation(kind: int) -> None:
    assert kind < PLUGIN_KIND_FIRST
    assert KINDS[kind].__module__ == CONVERSATIONS[kind >> 8].__name__


@pytest.mark.parametrize("number", CONVERSATIONS)
def test_every_message_of_a_conversation_has_a_kind(number: int) -> None:
    module = CONVERSATIONS[number]
    messages = {
        found
        for found in vars(module).values()
        if isinstance(found, type)
        and issubclass(found, Message)
        and found.__module__ == module.__name__
    }
    assert messages == {KINDS[kind] for kind in KINDS if kind >> 8 == number}


@pytest.mark.parametrize("message", KIND_OF, ids=lambda message: message.__name__)
def test_a_message_says_who_sends_it(message: type[Message]) -> None:
    module = CONVERSATIONS[KIND_OF[message] >> 8]
    purpose = prose_of(module).classes[message.__name__]
    assert " -> " in purpose or purpose.startswith("Either way:")


@pytest.mark.parametrize("message", KIND_OF, ids=lambda message: message.__name__)
def test_only_the_hot_kinds_are_arrays(message: type[Message]) -> None:
    config = message.__struct_config__
    assert config.array_like is (message.__name__ in HOT)
    assert config.frozen
    assert not config.forbid_unknown_fields


def test_init_has_a_conversation_of_its_own() -> None:
    union = set(get_args(init.InitMessage))
    assert union == {KINDS[kind] for kind in KINDS if kind >> 8 == 0x08}
