"""Connections: who is there, what they may do, and which requests wait for whose answer.

Soft: rebuilt by Hello after every start of the kernel.
Invariant (`check`): a session has one connection and a connection one session; a service name leads
to living sessions only; every request in flight belongs to a living session.
"""

from llmproto.connection import Beat
from llmproto.rights import PLUGIN_RIGHTS, ROLES, Right


class Session:
    """One welcomed connection."""

    __slots__ = (
        "asked_ns",
        "beat",
        "beat_ns",
        "handles",
        "id",
        "incarnation",
        "lost",
        "operator",
        "peer",
        "pid",
        "process",
        "ready",
        "reconciled",
        "requests",
        "rights",
        "role",
        "tenant",
        "welcomed_ns",
    )

    def __init__(
        self, peer: bytes, session: bytes, role: str, *, operator: bool, tenant: int, now_ns: int
    ) -> None:
        self.peer = peer
        self.id = session
        self.role = role
        self.operator = operator
        self.tenant = tenant
        rights = ROLES.get(role, PLUGIN_RIGHTS)
        if role == "client" and operator:
            rights |= ROLES["operator"]
        self.rights: frozenset[Right] = rights if operator else rights - {Right.OPERATE}
        self.process: str | None = None
        self.incarnation = 0
        self.pid: int | None = None
        self.welcomed_ns = now_ns
        self.beat_ns = now_ns
        self.asked_ns = now_ns
        """When a request was last passed on to it."""
        self.lost = False
        """Its connection is gone; it may come back before its lease ends."""
        self.ready = False
        self.beat: Beat | None = None
        """What it said that it holds, before it was ready."""
        self.reconciled = False
        """It has listed what it holds since it was welcomed."""
        self.handles: dict[int, tuple[int, bool]] = {}
        """Gateway: handle -> (tenant, operator)."""
        self.requests: dict[bytes, None] = {}
        """Ids of its requests in flight, in order."""

    @property
    def service(self) -> bool:
        """It answers requests."""
        return Right.SERVE in self.rights


class Request:
    """A request on its way to a service, until its answer comes back."""

    __slots__ = ("asked_ns", "id", "operator", "requester", "responder", "tenant")

    def __init__(
        self,
        message: bytes,
        requester: Session,
        responder: Session,
        *,
        tenant: int,
        operator: bool,
        now_ns: int,
    ) -> None:
        self.id = message
        self.requester = requester
        self.responder = responder
        self.tenant = tenant
        self.operator = operator
        self.asked_ns = now_ns


class SessionTable:
    """Sessions by connection, by id and by service name; requests by message id."""

    def __init__(self) -> None:
        self.by_peer: dict[bytes, Session] = {}
        self.by_id: dict[bytes, Session] = {}
        self.by_service: dict[str, dict[bytes, Session]] = {}
        self.requests: dict[bytes, Request] = {}
        """In flight, in the order of `asked_ns`."""

    def insert(self, session: Session) -> None:
        """A peer was welcomed."""
        self.by_peer[session.peer] = session
        self.by_id[session.id] = session
        if session.service:
            self.by_service.setdefault(session.role, {})[session.id] = session

    def remove(self, session: Session) -> list[Request]:
        """A peer is gone; returns the requests that it will never answer."""
        del self.by_peer[session.peer]
        del self.by_id[session.id]
        if session.service:
            peers = self.by_service[session.role]
            del peers[session.id]
            if not peers:
                del self.by_service[session.role]
        for message in session.requests:
            self.requests.pop(message, None)
        orphans = [r for r in self.requests.values() if r.responder is session]
        for request in orphans:
            self.answer(request.id)
        return orphans

    def ask(self, request: Request) -> None:
        """A request goes out; asking again replaces the earlier entry."""
        self.answer(request.id)
        self.requests[request.id] = request
        request.requester.requests[request.id] = None

    def answer(self, message: bytes) -> Request | None:
        """A request is answered; returns it if it was waited for."""
        request = self.requests.pop(message, None)
        if request is not None:
            request.requester.requests.pop(message, None)
        return request

    def of_service(self, name: str) -> Session | None:
        """A living, ready instance of a service: the one welcomed first."""
        for session in self.by_service.get(name, {}).values():  # a handful of instances
            if session.ready:
                return session
        return None

    def check(self) -> None:
        """Assert the invariant in full."""
        assert len(self.by_peer) == len(self.by_id)
        for session in self.by_id.values():
            assert self.by_peer[session.peer] is session
            for message in session.requests:
                assert self.requests[message].requester is session
        for peers in self.by_service.values():
            for session in peers.values():
                assert self.by_id[session.id] is session
        for request in self.requests.values():
            assert self.by_id[request.requester.id] is request.requester
            assert self.by_id[request.responder.id] is request.responder
