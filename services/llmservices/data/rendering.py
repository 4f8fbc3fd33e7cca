"""From an example to the text that is tokenised, and which part of it is learned.

Pure but for the chat template's own program.
"""

from collections.abc import Sequence
from datetime import datetime
from typing import Final, NamedTuple

from llmproto.errors import RemoteError, invalid
from llmproto.generation import ChatMessage

from llmservices.data.rows import (
    BadRow,
    Chat,
    Completion,
    Example,
    Labelled,
    Text,
    Turn,
)
from llmservices.texts.templates import ChatTemplate

NOW: Final = datetime(2026, 1, 1)
"""What templates that print the date print: the same text every day."""

Span = tuple[int, int]


class Rendered(NamedTuple):
    """Text on its way into the tokenizer."""

    text: str
    pair: str | None = None
    spans: tuple[Span, ...] | None = None
    """Characters whose tokens are learned; None: all."""
    special: bool = True
    """The tokenizer puts its special tokens around it; a chat template has written them."""
    end: bool = False
    """The end token follows, and is learned."""


class Renderer:
    """Examples as text for one model."""

    def __init__(self, template: ChatTemplate | None, *, learn_all: bool) -> None:
        self._template = template
        self._learn_all = learn_all

    def render(self, example: Example) -> Rendered:
        """BadRow where the chat template refuses this chat."""
        match example:
            case Text():
                return Rendered(example.text, end=True)
            case Labelled():
                return Rendered(example.text, example.pair)
            case Completion():
                if example.instruction and self._template is not None:
                    turns = Turn("user", example.asked), Turn("assistant", example.completion)
                    return self._chat(self._template, turns)
                between = "\n\n" if example.instruction else ""
                return self._completion(example.asked + between, example.completion)
            case Chat():
                if self._template is None:
                    raise invalid(
                        "the data are chats, and the tokenizer's folder has no chat template: add "
                        "chat_template.jinja"
                    )
                return self._chat(self._template, example.turns)

    def _completion(self, prompt: str, completion: str) -> Rendered:
        text = prompt + completion
        spans = None if self._learn_all else ((len(prompt), len(text)),)
        return Rendered(text, spans=spans, end=True)

    def _chat(self, template: ChatTemplate, turns: Sequence[Turn]) -> Rendered:
        messages = [_message(turn) for turn in turns]
        try:
            text = template.render(messages, now=NOW, add_generation_prompt=False)
            if self._learn_all:
                return Rendered(text, special=False)
            return Rendered(text, spans=_answers(template, messages, text), special=False)
        except RemoteError as error:
            raise BadRow(error.detail) from None


def _message(turn: Turn) -> ChatMessage:
    return ChatMessage(role=turn.role, content=turn.content)


def _answers(
    template: ChatTemplate, messages: Sequence[ChatMessage], text: str
) -> tuple[Span, ...]:
    """What the assistant is to write: from the prompt that asks for each answer to its end.

    BadRow where the template writes a chat's beginning otherwise once the chat goes on: then the
    answers cannot be told from the rest.
    """
    spans = []
    for index, message in enumerate(messages):
        if message.role != "assistant":
            continue
        before = template.render(messages[:index], now=NOW, add_generation_prompt=True)
        after = template.render(messages[: index + 1], now=NOW, add_generation_prompt=False)
        if not (text.startswith(after) and after.startswith(before)):
            raise BadRow(
                "the chat template does not render the beginning of this chat as it renders the "
                'whole, so its answers cannot be found: set loss = "all"'
            )
        spans.append((len(before), len(after)))
    return tuple(spans)
