"""Messages find their way: greetings, requests to services, answers back, everything else to the
kernel.

Changes: sessions, requests in flight.  Reads a body only where the kernel itself is asked.
"""

import hmac
from collections.abc import Callable

from llmproto import limits
from llmproto.base import Header, replaced
from llmproto.connection import Hello, Unknown, Welcome
from llmproto.errors import ErrorKind, RemoteError
from llmproto.kinds import KINDS, PLUGIN_KIND_FIRST
from llmproto.rights import KIND_RIGHTS, ROLES, Right

from llmkernel.processes import Process
from llmkernel.sessions import Request, Session
from llmkernel.supervision import Supervision
from llmkernel.tables import MS, Tables

RESERVED_ROLES = frozenset({"kernel", "init", "operator"})
"""The first two are not peers; the third is what a client becomes by its proof."""


class Router:
    """Who may say what to whom."""

    def __init__(self, tables: Tables, supervision: Supervision) -> None:
        self._t = tables
        self._supervision = supervision
        self.external_lost: Callable[[Process], None] = _unset
        """Set by the core: a process that somebody else started is gone."""
        self.want: Callable[[str], bool] = _never
        """Set by the core: start a service that is asked for."""

    # --- greeting ---------------------------------------------------------------------------------

    def unknown(self, peer: bytes) -> None:
        """Somebody who has not been welcomed speaks: say Hello first."""
        t = self._t
        stranger = Session(peer, bytes(16), "", operator=False, tenant=0, now_ns=t.now_ns)
        t.send(stranger, Unknown(t.epoch))

    def hello(self, peer: bytes, header: Header, hello: Hello) -> Session | None:
        """Welcome a peer, or say why not."""
        t = self._t
        stranger = Session(
            peer, hello.session, hello.role, operator=False, tenant=0, now_ns=t.now_ns
        )
        try:
            session = self._welcome(peer, hello)
        except RemoteError as error:
            t.fail(stranger, header.id, error.kind, error.detail, error.retry_after_ms)
            return None
        welcome = Welcome(
            kernel_epoch=t.epoch,
            boot_id=t.boot_id,
            protocol=limits.PROTOCOL_VERSION,
            beat_ms=limits.BEAT_MS,
            session=session.id,
            tenant=session.tenant,
        )
        t.reply(session, header.id, welcome)
        for thread in t.state.threads.by_session.get(session.id, {}).values():
            thread.lingering_ns = None
        return session

    def _welcome(self, peer: bytes, hello: Hello) -> Session:
        t = self._t
        if not hello.protocol_min <= limits.PROTOCOL_VERSION <= hello.protocol_max:
            raise RemoteError(
                ErrorKind.INVALID,
                f"protocol {limits.PROTOCOL_VERSION} is spoken here, the peer speaks "
                f"{hello.protocol_min} to {hello.protocol_max}",
            )
        process, operator = None, False
        if hello.role in RESERVED_ROLES:
            raise RemoteError(ErrorKind.DENIED, f"no peer may call itself {hello.role!r}")
        if hello.role == "client":
            if not self._same(hello.proof, t.config.operator_proof):
                raise RemoteError(ErrorKind.DENIED, "the proof is not the content of operator.key")
            operator = True
        elif hello.process is not None:
            process = t.processes.of_child(hello.process, hello.incarnation)
            known = process is not None and process.role == hello.role
            if process is None or not known or not self._same(hello.proof, process.proof):
                raise RemoteError(
                    ErrorKind.DENIED,
                    f"{hello.process!r} incarnation {hello.incarnation} is not the one that runs",
                )
        elif not self._same(hello.proof, t.config.service_proof):
            raise RemoteError(ErrorKind.DENIED, "the proof is not the content of service.key")
        if process is None and hello.role != "client":
            self._supervision.check_external(hello.session)
        if process is not None:
            operator = Right.OPERATE in ROLES.get(hello.role, frozenset())
        session = self._session(peer, hello, operator=operator)
        if process is None and session.service:
            process = self._supervision.external(session)
        if process is not None:
            self._supervision.greeted(session, process)
        return session

    def _same(self, proof: bytes, expected: bytes) -> bool:
        return bool(expected) and hmac.compare_digest(proof, expected)

    def _session(self, peer: bytes, hello: Hello, *, operator: bool) -> Session:
        t = self._t
        table = t.sessions
        known = table.by_id.get(hello.session)
        old = table.by_peer.get(peer)
        if old is not None and old is not known:
            self.leave(old)
        if known is not None:
            if known.role != hello.role or known.operator != operator:
                raise RemoteError(ErrorKind.DENIED, "this session belongs to somebody else")
            del table.by_peer[known.peer]
            known.peer = peer
            table.by_peer[peer] = known
            known.lost = False
            known.beat_ns = known.welcomed_ns = t.now_ns
            return known
        if len(table.by_id) >= limits.SESSIONS_MAX:
            raise RemoteError(
                ErrorKind.EXHAUSTED,
                f"{len(table.by_id)} connections of at most {limits.SESSIONS_MAX} are open",
                retry_after_ms=1000,
            )
        tenant = t.tenant(f"uid:{t.config.uid}")
        session = Session(
            peer, hello.session, hello.role, operator=operator, tenant=tenant, now_ns=t.now_ns
        )
        session.pid = hello.pid
        table.insert(session)
        return session

    def leave(self, session: Session) -> None:
        """A session is over: what it would have answered fails, what it reads lingers."""
        t = self._t
        for request in t.sessions.remove(session):
            self._unanswered(request)
        process = t.processes.by_name.get(session.process or "")
        if process is not None and process.session == session.id:
            process.session = None
            if process.external:
                self.external_lost(process)
        for thread in t.state.threads.by_session.get(session.id, {}).values():
            if thread.lingering_ns is None:
                thread.lingering_ns = t.now_ns

    def _unanswered(self, request: Request) -> None:
        t = self._t
        reason = t.refused.get(request.id)
        if reason is not None:
            t.fail(request.requester, request.id, ErrorKind.INTERNAL, reason)
            return
        detail = f"{request.responder.role} went away before it answered; ask again"
        t.fail(request.requester, request.id, ErrorKind.UNAVAILABLE, detail, 20)

    # --- rights -----------------------------------------------------------------------------------

    def allowed(self, session: Session, header: Header) -> bool:
        """Whether the sender may say this kind at all; refuses it if not."""
        t = self._t
        kind = KINDS.get(header.kind)
        if kind is None:
            rights: frozenset[Right] = frozenset()
            if header.kind >= PLUGIN_KIND_FIRST:
                rights = frozenset({Right.USE, Right.SERVE})
        else:
            rights = KIND_RIGHTS.get(kind, frozenset())
        if rights & session.rights:
            return True
        name = kind.__name__ if kind is not None else f"kind 0x{header.kind:04x}"
        if kind is None and header.kind < PLUGIN_KIND_FIRST:
            t.fail(session, header.id, ErrorKind.INVALID, f"{name} is not known here")
        elif header.reply_to is None:
            t.fail(session, header.id, ErrorKind.DENIED, f"{session.role} may not send {name}")
        return False

    def principal(self, session: Session, header: Header) -> tuple[int, bool] | None:
        """(tenant, operator) on whose behalf this is said; refuses a handle that is not the
        sender's."""
        if header.tenant is None:
            return session.tenant, session.operator
        found = session.handles.get(header.tenant)
        if found is None:
            detail = f"tenant handle {header.tenant} was not given to this connection"
            self._t.fail(session, header.id, ErrorKind.STALE, detail)
        return found

    # --- passing on -------------------------------------------------------------------------------

    def pass_on(self, session: Session, header: Header, body: tuple[bytes, ...]) -> None:
        """To one peer, or to a service."""
        t = self._t
        if header.kind >= PLUGIN_KIND_FIRST and not self._in_scope(session, header):
            return
        if header.reply_to is not None:
            self._answer(session, header, body)
        elif header.peer is not None:
            target = t.sessions.by_id.get(header.peer)
            if target is not None and (session.service or target.service):
                t.forward(target, replaced(header, source=session.id, tenant=None), body)
        else:
            self._ask(session, header, body)

    def _in_scope(self, session: Session, header: Header) -> bool:
        """Plug-in kinds are a plug-in's: it is asked and answers with them, and tells clients;
        everybody else is refused."""
        plugin = session.role not in ROLES
        if header.reply_to is not None:
            return plugin
        role = header.target
        if header.peer is not None:
            listener = self._t.sessions.by_id.get(header.peer)
            if listener is None or (plugin and Right.USE in listener.rights):
                return listener is not None
            role = listener.role
        if role not in ROLES:
            return True
        detail = f"kind 0x{header.kind:04x} is a plug-in's, and {role!r} is none"
        self._t.fail(session, header.id, ErrorKind.INVALID, detail)
        return False

    def _answer(self, session: Session, header: Header, body: tuple[bytes, ...]) -> None:
        t = self._t
        request = t.sessions.requests.get(header.reply_to or b"")
        if request is None or request.responder is not session:
            return  # too late: it was answered, or the requester is gone
        t.sessions.answer(request.id)
        t.suspect_requests.pop(request.id, None)
        to = request.requester
        header = replaced(header, source=session.id, tenant=None, target=to.role, peer=to.id)
        t.forward(to, header, body)

    def _ask(self, session: Session, header: Header, body: tuple[bytes, ...]) -> None:
        t = self._t
        principal = self.principal(session, header)
        if principal is None:
            return
        tenant, operator = principal
        reason = t.refused.get(header.id)
        if reason is not None:
            t.fail(session, header.id, ErrorKind.INTERNAL, reason)
            return
        target = t.sessions.of_service(header.target)
        if target is None:
            self._nobody_serves(session, header)
            return
        if header.id not in session.requests:
            if len(session.requests) >= limits.REQUESTS_IN_FLIGHT_MAX:
                detail = f"{len(session.requests)} requests of this connection are unanswered"
                t.fail(session, header.id, ErrorKind.EXHAUSTED, detail, 100)
                return
            if header.id in t.sessions.requests:
                t.fail(session, header.id, ErrorKind.INVALID, "this message id is in use")
                return
        if not self._may_enter(target, header):
            detail = f"{header.target} is trying requests one at a time after it died of one"
            t.fail(session, header.id, ErrorKind.UNAVAILABLE, detail, 50)
            return
        target.asked_ns = t.now_ns
        if _asks(header.kind):
            request = Request(
                header.id, session, target, tenant=tenant, operator=operator, now_ns=t.now_ns
            )
            t.sessions.ask(request)
        t.forward(target, replaced(header, source=session.id, tenant=tenant), body)

    def _nobody_serves(self, session: Session, header: Header) -> None:
        """What init starts will come, and so may a plug-in that somebody else starts."""
        t = self._t
        name = header.target
        if any(p.role == name for p in t.processes.by_name.values()) or self.want(name):
            detail = f"service {name!r} is not up yet"
            t.fail(session, header.id, ErrorKind.UNAVAILABLE, detail, 50)
        elif name in ROLES:
            t.fail(session, header.id, ErrorKind.INVALID, f"no {name} runs in this system")
        else:
            detail = f"nobody has come to serve {name!r} yet: is it installed and started?"
            t.fail(session, header.id, ErrorKind.UNAVAILABLE, detail, 200)

    def _may_enter(self, target: Session, header: Header) -> bool:
        """Requests that were in a service when it died by itself enter it alone."""
        t = self._t
        if not t.suspect_requests or not _asks(header.kind):
            return True
        inside = [r.id for r in t.sessions.requests.values() if r.responder is target]
        others = [message for message in inside if message != header.id]
        if header.id in t.suspect_requests:
            return not others
        return not any(message in t.suspect_requests for message in others)

    def responder_died(self, session: Session) -> None:
        """A service died by itself: what was in it is suspect; what was alone in it has a
        strike."""
        t = self._t
        inside = [r.id for r in t.sessions.requests.values() if r.responder is session]
        for message in inside:
            strikes = t.suspect_requests.pop(message, 0)
            if len(inside) == 1:
                strikes += 1
            if strikes >= limits.STRIKES_MAX:
                self.refuse(message, f"{session.role} died {strikes} times of this request")
            else:
                t.suspect_requests[message] = strikes
        while len(t.suspect_requests) > limits.SUSPECT_REQUESTS_MAX:
            del t.suspect_requests[next(iter(t.suspect_requests))]

    def refuse(self, message: bytes, reason: str) -> None:
        """This request is never tried again."""
        refused = self._t.refused
        refused[message] = reason
        while len(refused) > limits.SUSPECT_REQUESTS_MAX:
            del refused[next(iter(refused))]

    # --- leases -----------------------------------------------------------------------------------

    def expire(self) -> None:
        """Sessions that have not beaten for their lease are over; so are requests that nobody has
        repeated or answered for very long."""
        t = self._t
        old_ns = t.now_ns - limits.RESUME_MS_MAX * MS
        while t.sessions.requests:
            oldest = next(iter(t.sessions.requests.values()))
            if oldest.asked_ns >= old_ns:
                break
            t.sessions.answer(oldest.id)
        before_ns = t.now_ns - limits.SESSION_LEASE_MS * MS
        for session in [s for s in t.sessions.by_id.values() if s.beat_ns < before_ns]:
            process = t.processes.by_name.get(session.process or "")
            if process is not None and process.pid is not None:
                continue  # init says when it is gone; `watch` sees to it
            t.log("info", "session lapsed", role=session.role, session=session.id.hex())
            self.leave(session)


def _never(role: str) -> bool:
    return False


def _unset(process: Process) -> None:
    raise AssertionError(process.name)


def _asks(kind: int) -> bool:
    """Whether the kind is a request: something that is answered."""
    message = KINDS.get(kind)
    return message is None or message.__name__ not in _UNANSWERED


_UNANSWERED = frozenset({"StreamAcked", "Metrics", "Text"})
