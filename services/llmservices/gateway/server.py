"""uvicorn, with what it leaves open: bounded headers, bounded connections, time limits, errors in
OpenAI's form."""

import asyncio
import contextlib
import socket
from collections.abc import Iterator
from typing import Any, Final

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from llmservices.gateway.errors import HttpError

CONNECTIONS_MAX: Final = 4096
"""Of one worker; each is a file descriptor and a few KB."""
HEADER_BYTES_MAX: Final = 64 << 10
HEADER_S: Final = 10.0
"""From the first byte of a request (of a connection: from its start) to the end of its headers."""
KEEP_ALIVE_S: Final = 30
SHUTDOWN_S: Final = 1
"""Below what init allows between SIGTERM and SIGKILL."""


class GuardedProtocol(HttpToolsProtocol):
    """One connection; headers that are too long or too slow end it."""

    def __init__(self, *arguments: Any, **named: Any) -> None:  # Any: they are uvicorn's own
        super().__init__(*arguments, **named)
        self._header_timer: asyncio.TimerHandle | None = None
        self._header_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as uvicorn's
        super().connection_made(transport)
        if len(self.connections) > CONNECTIONS_MAX:
            self._refuse(
                HttpError(
                    429,
                    f"{CONNECTIONS_MAX} connections are open, the most there may be",
                    retry_after_ms=1_000,
                )
            )
            return
        self._wait_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._headers_came()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._header_timer is not None:
            self._header_bytes += len(data)
            if self._header_bytes > HEADER_BYTES_MAX and b"\r\n\r\n" not in data:
                self._refuse(
                    HttpError(
                        431,
                        f"the headers have {self._header_bytes} bytes so far; at most "
                        f"{HEADER_BYTES_MAX} are read",
                    )
                )
                return
        super().data_received(data)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        if self._header_timer is None:
            self._wait_headers()

    def on_headers_complete(self) -> None:
        self._headers_came()
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        """uvicorn's way to refuse what is no HTTP."""
        self._refuse(HttpError(400, msg, code="invalid_http"))

    def _wait_headers(self) -> None:
        self._header_bytes = 0
        self._header_timer = self.loop.call_later(HEADER_S, self._too_slow)

    def _headers_came(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _too_slow(self) -> None:
        self._header_timer = None
        self._refuse(HttpError(408, f"the headers did not come within {HEADER_S:g} s"))

    def _refuse(self, error: HttpError) -> None:
        """Answer without an application, and close."""
        if self.transport.is_closing():
            return
        lines = [
            f"HTTP/1.1 {error.status} Refused",
            "content-type: application/json",
            f"content-length: {len(error.json)}",
            "connection: close",
            *(f"{name}: {value}" for name, value in error.headers.items()),
        ]
        self.transport.write("\r\n".join(lines).encode() + b"\r\n\r\n" + error.json)
        self.transport.close()


class HttpServer(uvicorn.Server):
    """Serves on a socket until told to stop; signals are the service's own business."""

    def __init__(self, app: ASGIApp, bound: socket.socket) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=GuardedProtocol,
                ws="none",
                lifespan="off",
                log_config=None,
                log_level="critical",
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=SHUTDOWN_S,
            )
        )
        self._bound = bound
        self._stopped = asyncio.Event()

    async def main_loop(self) -> None:
        """Once a second is enough for the date in the headers; uvicorn wakes ten times as often."""
        while not await self.on_tick(0):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1):
                    await self._stopped.wait()

    def stop(self) -> None:
        """Take no more, give what is under way a moment, end."""
        self.should_exit = True
        self._stopped.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """None."""
        yield

    async def run_here(self) -> None:
        """Serve, in the running loop."""
        await self.serve(sockets=[self._bound])
