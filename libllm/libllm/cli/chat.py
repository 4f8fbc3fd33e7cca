"""A conversation at the terminal."""

import sys
from typing import TYPE_CHECKING

from llmproto.errors import ErrorKind, RemoteError

from libllm.cli.output import refuse, say
from libllm.cli.run import start

if TYPE_CHECKING:
    from libllm.cli.system import Operator, System
    from libllm.options import Options

PROMPT = ">>> "
GOES_ON = (ErrorKind.INVALID, ErrorKind.EXHAUSTED, ErrorKind.DEADLINE, ErrorKind.UNAVAILABLE)
"""Refusals of one turn, after which another one may succeed."""


def converse(
    system: "System",
    operator: "Operator",
    options: "Options",
    system_text: str | None,
    *,
    chat: bool,
) -> None:
    """Turns until the end of input.  Without a chat template each line is text to continue.

    Ctrl-C ends an answer, which stays in the conversation as far as it came.
    """
    say("Ctrl-C ends an answer, Ctrl-D the chat.")
    if not chat:
        say("This model has no chat template (or --raw was given): it continues what you write.")
    turns: list[dict[str, str]] = []
    if system_text is not None:
        turns.append({"role": "system", "content": system_text})
    while True:
        try:
            line = system.input(PROMPT)
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
            continue
        if not line.strip():
            continue
        asked = [*turns, {"role": "user", "content": line}]
        try:
            text = _answer(operator, line, asked if chat else None, options)
        except RemoteError as error:
            if error.kind not in GOES_ON:
                raise
            refuse(f"{error.kind.value}: {error.detail}")
            continue
        turns = [*asked, {"role": "assistant", "content": text}]


def _answer(
    operator: "Operator", line: str, turns: list[dict[str, str]] | None, options: "Options"
) -> str:
    """The answer as far as it came, printed as it comes."""
    texts: list[str] = []
    try:
        pieces = start(operator, line, turns, options)
        try:
            for piece in pieces:
                texts.append(piece.text)
                sys.stdout.write(piece.text)
                sys.stdout.flush()
        finally:
            pieces.close()
    except KeyboardInterrupt:
        pass  # What came is kept; close() has cancelled the rest.
    print()
    return "".join(texts)
