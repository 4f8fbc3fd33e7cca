"""`python -m tests.system.faults.tokenizer`: it passes points, and cannot bear one word."""

import os

from libllm.events import Arrived
from llmproto.generation import Generate
from llmservices.tokenizer.__main__ import main

from tests.system.faults.serving import FaultyServing

DEADLY = "xyzzy"
"""A prompt with this word ends the process."""


class Frail(FaultyServing):
    """Dies of one word."""

    def _handle(self, arrived: Arrived) -> None:
        message = arrived.message
        if isinstance(message, Generate) and DEADLY in (message.prompt or ""):
            os._exit(3)
        super()._handle(arrived)


if __name__ == "__main__":
    main(serving=Frail)
