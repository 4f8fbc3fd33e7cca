"""One thread for what would hold up everybody's text: loading vocabularies, encoding long prompts.

Invariant: one thing at a time, in order, and at most `WAITING_MAX` wait.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeVar

from llmproto.errors import ErrorKind, RemoteError

WAITING_MAX: Final = 256
"""A megabyte of prompt takes about half a second: more than this nobody would wait for."""
T = TypeVar("T")


class Worker:
    """The thread and its queue."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="worker")
        self._waiting = 0

    async def do(self, call: Callable[[], T]) -> T:
        """The result of this call, made there; EXHAUSTED where too many wait."""
        if self._waiting >= WAITING_MAX:
            raise RemoteError(
                ErrorKind.EXHAUSTED,
                f"{self._waiting} long prompts wait to be encoded, the most there may be",
                retry_after_ms=1000,
            )
        self._waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, call)
        finally:
            self._waiting -= 1
