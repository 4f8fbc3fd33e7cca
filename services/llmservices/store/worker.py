"""One thread for what takes long.

Invariant: one thing at a time, in the order asked, and at most WAITING_MAX wait.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeVar

from llmproto.errors import ErrorKind, RemoteError

WAITING_MAX: Final = 64
"""Each may hold a megabyte of small files."""
T = TypeVar("T")


class Worker:
    """The thread and its queue."""

    def __init__(self, name: str) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._waiting = 0

    async def do(self, call: Callable[[], T]) -> T:
        """The result of this call, made there; EXHAUSTED where too many wait."""
        if self._waiting >= WAITING_MAX:
            raise RemoteError(
                ErrorKind.EXHAUSTED,
                f"{self._waiting} requests wait for the store's disk, the most there may be",
                retry_after_ms=1000,
            )
        self._waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, call)
        finally:
            self._waiting -= 1
