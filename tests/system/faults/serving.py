"""A service that passes a point with every message: `ROLE.in.KIND` before it is handled,
`ROLE.out.KIND` before it is sent."""

from collections.abc import Callable

from libllm.config import ProcessEnvironment
from libllm.events import Arrived, Call, Event, Post
from libllm.port import Port
from libllm.service import Service, Serving

from tests.system.faults.points import Points


class FaultyServing(Serving):
    """Passes points at its two doors."""

    def __init__(
        self, make: Callable[[Port], Service], *, role: str, environment: ProcessEnvironment
    ) -> None:
        self._points = Points()
        self._role = role
        super().__init__(make, role=role, environment=environment)

    def _feed(self, event: Event) -> None:
        if isinstance(event, (Post, Call)):
            self._points.passing(f"{self._role}.out.{type(event.message).__name__}")
        super()._feed(event)

    def _handle(self, arrived: Arrived) -> None:
        self._points.passing(f"{self._role}.in.{type(arrived.message).__name__}")
        super()._handle(arrived)
