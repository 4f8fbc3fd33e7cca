"""API keys: whose request is it?  The kernel alone knows; this remembers its answers for moments.

Keys are compared by the kernel, by their hash; nothing here is logged.
Invariant (`check`): what is remembered of unknown keys is bounded; of known keys there are no more
than the kernel knows.
"""

import contextlib
import hashlib
import time
from collections.abc import Iterator
from typing import Final

from libllm.port import Port
from llmproto.base import Message
from llmproto.errors import ErrorKind, RemoteError
from llmproto.rights import Right
from llmproto.tenants import KeyPresent, KeyPresented

from llmservices.gateway.errors import HttpError
from llmservices.gateway.llm import Llm

FRESH_NS: Final = 5_000_000_000
"""For so long an answer is taken as it was: a removed key works no longer than this."""
UNKNOWN_MAX: Final = 1024
PATIENCE_MS: Final = 5_000
KEY_BYTES_MAX: Final = 256
CHALLENGE: Final = {"www-authenticate": "Bearer"}


class Caller:
    """On whose behalf a request is made."""

    def __init__(self, key: bytes, presented: KeyPresented | None, checked_ns: int) -> None:
        self.key = key
        self.presented = presented
        """Absent: nobody's key; the gateway's own tenant."""
        self.checked_ns = checked_ns
        self.requests = 0
        """Under way."""

    @property
    def tenant(self) -> int | None:
        """For the header."""
        return None if self.presented is None else self.presented.handle


class Keys:
    """Who calls, by the Authorization header."""

    def __init__(self, llm: Llm, *, required: bool) -> None:
        self.required = required
        self._llm = llm
        self._nobody = Caller(b"", None, 0)
        self._known: dict[bytes, Caller] = {}
        """By SHA-256 of the key."""
        self._unknown: dict[bytes, int] = {}
        """When it was said, oldest first."""

    def check(self) -> None:
        """Assert the invariant."""
        assert len(self._unknown) <= UNKNOWN_MAX
        assert not self._known.keys() & self._unknown.keys()

    async def caller(self, authorization: str | None, right: Right | None) -> Caller:
        """Who calls; HttpError(401 | 403) where that is not allowed."""
        if right is None:
            return self._nobody
        key = _key(authorization)
        caller = await self._find(key) if key else None
        if caller is None:
            if not self.required:
                return self._nobody
            detail = "this API key is not known" if key else "an API key is required"
            raise HttpError(
                401,
                f"{detail}: send it as `Authorization: Bearer KEY`",
                code="invalid_api_key",
                headers=CHALLENGE,
            )
        presented = caller.presented
        if right is not Right.USE and not (presented is not None and presented.operator):
            raise HttpError(403, f"this key has no right to {right.value}", type="permission_error")
        return caller

    @contextlib.contextmanager
    def holding(self, caller: Caller) -> Iterator[None]:
        """While a request is under way, its key is presented to every new kernel."""
        caller.requests += 1
        try:
            yield
        finally:
            caller.requests -= 1

    def welcomed(self, port: Port) -> None:
        """A kernel, perhaps a new one, welcomed this session: say the keys in use before the
        requests are repeated that cite them."""
        for digest, caller in list(self._known.items()):
            if caller.requests:
                port.ask(KeyPresent(caller.key), _Presented(caller))
            else:
                del self._known[digest]

    async def _find(self, key: bytes) -> Caller | None:
        digest = hashlib.sha256(key).digest()
        now_ns = time.monotonic_ns()
        known = self._known.get(digest)
        if known is not None and now_ns - known.checked_ns < FRESH_NS:
            return known
        if now_ns - self._unknown.get(digest, now_ns - FRESH_NS) < FRESH_NS:
            return None
        try:
            presented = await self._llm.call(KeyPresent(key), KeyPresented, patience_ms=PATIENCE_MS)
        except RemoteError as error:
            if error.kind is not ErrorKind.DENIED:
                raise
            self._known.pop(digest, None)
            self._forget(digest, now_ns)
            return None
        self._unknown.pop(digest, None)
        known = self._known.setdefault(digest, Caller(key, presented, now_ns))
        known.presented, known.checked_ns = presented, now_ns
        return known

    def _forget(self, digest: bytes, now_ns: int) -> None:
        self._unknown.pop(digest, None)
        self._unknown[digest] = now_ns
        if len(self._unknown) > UNKNOWN_MAX:
            del self._unknown[next(iter(self._unknown))]


class _Presented:
    """Takes the kernel's answer for one caller."""

    def __init__(self, caller: Caller) -> None:
        self._caller = caller

    def __call__(self, answer: Message) -> None:
        if isinstance(answer, KeyPresented):
            self._caller.presented = answer
        else:
            self._caller.checked_ns = 0  # asked again at its next use


def _key(authorization: str | None) -> bytes:
    """The key in the header; empty where there is none."""
    scheme, _, key = (authorization or "").partition(" ")
    found = key.strip().encode("latin-1", "replace")
    return found if scheme.lower() == "bearer" and len(found) <= KEY_BYTES_MAX else b""
