"""A kernel that is imported and waits: init promotes it when its predecessor dies."""

import os
import select

from llmproto import init

from llmkernel.initlink import Link


def await_promotion(
    link: Link, lifeline_fd: int | None
) -> tuple[init.Promoted, list[init.InitMessage]]:
    """Block until init says so; also what it has said since.  The process ends when init does."""
    watched = [link.fileno()] + ([lifeline_fd] if lifeline_fd is not None else [])
    while True:
        readable, _, _ = select.select(watched, [], [])
        if lifeline_fd in readable:
            os._exit(0)
        messages = link.receive()
        for number, message in enumerate(messages):
            if isinstance(message, init.Promoted):
                return message, messages[number + 1 :]
        if link.closed:
            os._exit(0)
