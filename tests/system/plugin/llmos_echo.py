"""A complete plug-in service: its messages, their table, its handlers, its process."""

import os

from libllm.config import ProcessEnvironment
from libllm.plugins import Kinds
from libllm.service import Handlers, Request, Service, run
from llmproto.base import Message


class Ask(Message, frozen=True):
    """Client -> echo.  Answered by Said, with the same blobs in the opposite order."""

    text: str
    not_by: int | None = None
    """The process with this id keeps the question to itself."""


class Said(Message, frozen=True):
    """Echo -> client."""

    text: str
    pid: int
    """Who says it."""


KINDS = Kinds({0x8000: Ask, 0x8001: Said})


class Echo(Service):
    """Says what it is asked."""

    def handlers(self) -> Handlers:
        return {Ask: self.ask}

    def kinds(self) -> Kinds:
        return KINDS

    def ask(self, message: Ask, request: Request) -> None:
        pid = os.getpid()
        if message.not_by != pid:
            request.reply(Said(message.text, pid), blobs=request.blobs[::-1])


def main() -> None:
    """Be the service `echo`."""
    run(lambda port: Echo(), role="echo", environment=ProcessEnvironment.read())


if __name__ == "__main__":
    main()
