"""`python -m tests.system.faults.kernel`: the kernel, which passes points.

`kernel.in.KIND` before a message for it is handled, `kernel.out.KIND` when the facts behind a
message of its own are journaled and the message has not left, `kernel.pass.KIND` likewise for one
that it passes on, `kernel.replay` with every fact that a restart reads.
"""

import msgspec
from llmkernel.__main__ import Parts, main
from llmkernel.core import Kernel
from llmkernel.events import Arrived, Effect, Event, Forward, KernelConfig, Send
from llmkernel.facts import AnyFact
from llmkernel.shell import Shell
from llmkernel.state import State
from llmproto import wire
from llmproto.errors import RemoteError
from llmproto.kinds import KINDS

from tests.system.faults.points import Points

POINTS = Points()
MODULES = {"tokenizer": "tests.system.faults.tokenizer"}


class FaultyKernel(Kernel):
    """Passes a point with every message for it."""

    def handle(self, now_ns: int, event: Event) -> list[Effect]:
        state = self.tables.state
        assert isinstance(state, FaultyState)
        state.alive = True
        if isinstance(event, Arrived):
            try:
                header = wire.decode_header(event.frames)
            except RemoteError:
                pass
            else:
                if header.target == "kernel":
                    POINTS.passing(f"kernel.in.{_name(header.kind)}")
        return super().handle(now_ns, event)


class FaultyShell(Shell):
    """Passes a point with every message that leaves."""

    def _perform(self, effect: Effect) -> None:
        if isinstance(effect, Send):
            POINTS.passing(f"kernel.out.{type(effect.message).__name__}")
        elif isinstance(effect, Forward):
            POINTS.passing(f"kernel.pass.{_name(effect.header.kind)}")
        super()._perform(effect)


class FaultyState(State):
    """Passes a point with every fact that is replayed."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = False
        """A kernel handles events."""

    def apply(self, fact: AnyFact) -> None:
        if not self.alive:
            POINTS.passing("kernel.replay")
        super().apply(fact)


def _name(kind: int) -> str:
    known = KINDS.get(kind)
    return str(kind) if known is None else known.__name__


def configure(config: KernelConfig) -> KernelConfig:
    """The services that pass points stand in for those that do not."""
    services = tuple(
        msgspec.structs.replace(spec, module=MODULES.get(spec.role, spec.module))
        for spec in config.services
    )
    return msgspec.structs.replace(
        config, services=services, executor_module="tests.system.faults.executor"
    )


if __name__ == "__main__":
    main(Parts(kernel=FaultyKernel, shell=FaultyShell, state=FaultyState, configure=configure))
