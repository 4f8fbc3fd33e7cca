"""What surrounds every route: rights, errors as OpenAI's bodies, measurements; and how a body is
read."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Final

from llmproto.errors import RemoteError
from llmproto.rights import ROUTE_RIGHTS
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from libllm import logs
from llmservices.gateway.errors import CANCELLED, HttpError, of_remote
from llmservices.gateway.keys import Caller, Keys
from llmservices.gateway.measures import Measures

BODY_S: Final = 30.0
"""From the end of the headers to the end of the body."""
DISCARDED_BYTES_MAX: Final = 64 << 20
"""Of a body that is too large: read and thrown away, as most clients read no answer before they
have sent everything."""
JSON_TYPE: Final = "application/json"


class Call:
    """One request that was let in."""

    def __init__(self, caller: Caller) -> None:
        self.caller = caller


Handle = Callable[[Request, Call], Awaitable[Response]]


class Endpoint:
    """One path as an ASGI application."""

    def __init__(
        self, path: str, handles: Mapping[str, Handle], keys: Keys, measures: Measures
    ) -> None:
        self._route = path.replace(":path}", "}")
        self._handles = handles
        self._rights = {method: ROUTE_RIGHTS[method, self._route] for method in handles}
        self._keys = keys
        self._measures = measures

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer."""
        began_s = time.monotonic()
        method = "GET" if scope["method"] == "HEAD" else scope["method"]
        status = CANCELLED

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            failure = await self._answer(method, scope, receive, sending)
            if failure is not None and status == CANCELLED:
                await error_response(failure)(scope, receive, sending)
        finally:
            self._measures.answered(method, self._route, status, time.monotonic() - began_s)

    async def _answer(
        self, method: str, scope: Scope, receive: Receive, send: Send
    ) -> HttpError | None:
        """Answer, or give the error that is to be the answer (unless one has begun)."""
        request = Request(scope, receive)
        try:
            caller = await self._keys.caller(
                request.headers.get("authorization"), self._rights[method]
            )
            with self._keys.holding(caller):
                response = await self._handles[method](request, Call(caller))
                await response(scope, receive, send)
                return None
        except HttpError as error:
            return error
        except RemoteError as error:
            return of_remote(error)
        except ClientDisconnect:
            return None
        except Exception:
            # One request that breaks an invariant must not end the streams of the others, as the
            # end of this process would.
            logs.configure("gateway").error("request_broke", route=self._route, exc_info=True)
            return HttpError(500, "an invariant of the gateway broke; its log tells more")


def error_response(error: HttpError) -> Response:
    """An error as its answer."""
    return Response(error.json, error.status, error.headers, media_type=JSON_TYPE)


async def http_exception(request: Request, error: Exception) -> Response:
    """Starlette's own 404 and 405, in OpenAI's form."""
    assert isinstance(error, HTTPException), error
    path = request.url.path[:256]
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "")
        detail = f"{request.method} is not a method of {path}; use {allowed}"
        return error_response(HttpError(405, detail, headers=dict(error.headers or {})))
    detail = f"there is nothing at {path}; GET /openapi.json lists what there is"
    return error_response(HttpError(404, detail))


async def read_body(request: Request, bytes_max: int) -> bytes:
    """The JSON body; HttpError(408 | 413 | 415)."""
    content_type = request.headers.get("content-type", "")
    if content_type.partition(";")[0].strip().lower() != JSON_TYPE:
        raise HttpError(
            415, f"the content type is {content_type[:64]!r}; send {JSON_TYPE}", param=None
        )
    announced = request.headers.get("content-length", "")
    expected = int(announced) if announced.isdecimal() and len(announced) < 20 else 0
    body = bytearray()
    found = 0
    try:
        async with asyncio.timeout(BODY_S):
            async for part in request.stream():
                found += len(part)
                if max(found, expected) <= bytes_max:
                    body += part
                elif found > bytes_max + DISCARDED_BYTES_MAX:
                    break
    except TimeoutError:
        raise HttpError(
            408,
            f"the body did not come within {BODY_S:g} s ({found} bytes did)",
            headers={"connection": "close"},
        ) from None
    if max(found, expected) > bytes_max:
        raise HttpError(
            413,
            f"the body has {max(found, expected)} bytes; at most {bytes_max} are taken ([gateway] "
            "body_bytes_max)",
            code="body_too_large",
            headers={"connection": "close"},
        )
    return bytes(body)
