"""The gateway as a service: a bus client whose callers come over HTTP."""

import asyncio
from typing import Final

from libllm.config import GatewayConfig, ProcessEnvironment
from libllm.port import Port
from libllm.service import Handlers, Service
from llmproto.base import Message
from llmproto.operation import Note

from libllm import logs
from llmservices.gateway.app import application
from llmservices.gateway.bus import BusLlm
from llmservices.gateway.keys import Keys
from llmservices.gateway.measures import Measures
from llmservices.gateway.server import HttpServer
from llmservices.gateway.sockets import bind, bind_any, is_loopback, url

REPORT_S: Final = 2.0
REPORTS_IDLE: Final = 5
"""A report that says nothing new goes out only every so many times."""


class GatewayService(Service):
    """Listens, and reports what it measured."""

    def __init__(
        self, port: Port, *, environment: ProcessEnvironment, config: GatewayConfig
    ) -> None:
        self._port = port
        self._environment = environment
        self._config = config
        self._measures = Measures()
        self._llm = BusLlm(port)
        self._is_open_to_others = not is_loopback(config.host)
        required = config.keys_required or self._is_open_to_others
        self._keys = Keys(self._llm, required=required)
        self._address = ""
        self._server: HttpServer | None = None
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def keys_required(self) -> bool:
        """By choice, or by force where others can reach it."""
        return self._keys.required

    def handlers(self) -> Handlers:
        """It answers nobody on the bus."""
        return {}

    async def start(self) -> None:
        """Listen; RemoteError where the address cannot be had."""
        config = self._config
        lock = None
        if config.workers != 1:
            lock = self._environment.home.run / f"gateway-{config.port}.lock"
        if config.port == 0:
            bound = bind_any(config.host, self._environment.home.run / "gateway.port")
        else:
            bound = bind(config.host, config.port, shared_lock=lock)
        self._address = url(bound)
        app = application(
            self._llm, self._keys, self._measures, body_bytes_max=config.body_bytes_max
        )
        self._server = HttpServer(app, bound)
        self._tasks = [
            asyncio.create_task(self._server.run_here()),
            asyncio.create_task(self._report()),
        ]
        for task in self._tasks:
            task.add_done_callback(_must_not_fail)
        if self._is_open_to_others:
            said = f"{self._address} can be reached from outside: API keys are required"
            logs.configure("gateway").warning("open_to_others", address=self._address)
            self._port.ask(Note(said), _heard)

    def address(self) -> str:
        """Where HTTP is spoken."""
        return self._address

    def welcomed(self) -> None:
        """A new kernel knows none of the keys that were presented to the last one."""
        self._keys.welcomed(self._port)

    async def drain(self) -> None:
        """Take no more; what is under way gets a moment."""
        if self._server is not None:
            self._server.stop()
            serving, reporting = self._tasks
            reporting.cancel()
            await asyncio.wait((serving, reporting))

    async def _report(self) -> None:
        """Metrics to the monitor, for ever."""
        environment = self._environment
        process = environment.process or "gateway"
        last = None
        idle = 0
        while True:
            await asyncio.sleep(REPORT_S)
            report = self._measures.report(process, environment.incarnation)
            idle = idle + 1 if report == last else 0
            if idle % REPORTS_IDLE == 0:
                self._port.send(report, target="monitor")
            last = report


def _heard(answer: Message) -> None:
    """The kernel logged it."""


def _must_not_fail(task: "asyncio.Task[None]") -> None:
    """What this raises reaches the loop, and ends the process."""
    if not task.cancelled():
        task.result()
