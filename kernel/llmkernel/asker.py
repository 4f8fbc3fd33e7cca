"""On whose behalf something is asked of the kernel."""

from llmproto.base import Header

from llmkernel.sessions import Session


class Asker:
    """On whose behalf a call is made."""

    __slots__ = ("header", "operator", "session", "tenant")

    def __init__(self, session: Session, header: Header, *, tenant: int, operator: bool) -> None:
        self.session = session
        self.header = header
        self.tenant = tenant
        self.operator = operator
