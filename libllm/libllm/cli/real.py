"""The world behind the command line: processes, sockets, the terminal."""

import asyncio
import os
import signal
import time
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, NoReturn

from llmproto.errors import ErrorKind, RemoteError
from llmproto.operation import ProcessRow, ProcessState

from libllm import boot, sync
from libllm.cli import logfiles
from libllm.cli.system import Operator
from libllm.config import Home, SystemConfig

STOP_S: Final = 20.0
"""Init ends within its phases' times, which are less."""
ANSWER_S: Final = 3.0
"""For a kernel to welcome who wants to stop it; init is asked after that."""
TURN_S: Final = 3.0
"""Longer than a boot takes that goes well."""
STARTS_MAX: Final = 3
"""A service that ended so often without ever getting ready will not get ready."""


class RealSystem:
    """Implements `libllm.cli.system.System`."""

    def home(self, given: str | None) -> Home:
        """The home that the option names, else the environment's."""
        return Home.find(given)

    def is_running(self, home: Home) -> bool:
        """Whether somebody holds the home, ready or not."""
        return boot.is_running(home)

    def connect(self, home: Home) -> AbstractContextManager[Operator]:
        """RemoteError(UNAVAILABLE) where nothing runs."""
        if not boot.is_running(home):
            raise RemoteError(
                ErrorKind.UNAVAILABLE,
                f"no system runs in {home.root}: start one with `llmos up`",
            )
        return sync.connect(home.root)

    def boot(self, home: Home, *, timeout_s: float) -> bool:
        """Until it is ready; False where it ran already.  RemoteError with the reason otherwise,
        and what was booted is stopped again."""
        ran = boot.is_running(home)
        if not ran:
            SystemConfig.read(home.config)  # the kernel's refusal would only stand in its log
        try:
            self._boot(home, time.monotonic() + timeout_s)
        except (RemoteError, KeyboardInterrupt):
            if not ran:
                self.stop(home)
            raise
        return not ran

    def _boot(self, home: Home, deadline_s: float) -> None:
        """In turns, to see between them whether it is hopeless."""
        began = datetime.now(UTC).isoformat()
        while True:
            left_s = deadline_s - time.monotonic()
            try:
                boot.boot(home, timeout_s=max(0.1, min(TURN_S, left_s)))
                return
            except RemoteError as error:
                if error.kind is not ErrorKind.DEADLINE or left_s <= TURN_S:
                    raise
            refused = kernel_refusal(home, since=began)
            if refused is not None:
                raise RemoteError(ErrorKind.UNAVAILABLE, refused)
            hopeless = self._hopeless(home)
            if hopeless is not None:
                raise RemoteError(ErrorKind.UNAVAILABLE, why_hopeless(home, hopeless))

    def _hopeless(self, home: Home) -> ProcessRow | None:
        """A process that will not get ready; None where the kernel does not answer yet."""
        try:
            with sync.connect(home.root, timeout_s=1.0) as client:
                return next((row for row in client.ps() if is_hopeless(row)), None)
        except RemoteError as error:
            if error.kind not in (ErrorKind.DEADLINE, ErrorKind.UNAVAILABLE):
                raise
            return None

    def become(self, home: Home) -> NoReturn:
        """Boot in the foreground, in the place of this process."""
        SystemConfig.read(home.config)
        boot.boot_foreground(home)

    def stop(self, home: Home) -> bool:
        """Until nothing of it is left; False where nothing ran."""
        if not boot.is_running(home):
            return False
        try:
            with sync.connect(home.root, timeout_s=ANSWER_S) as client:
                client.shutdown()
        except RemoteError as error:
            if error.kind not in (ErrorKind.UNAVAILABLE, ErrorKind.DEADLINE):
                raise
            _signal_init(home, signal.SIGTERM)
        if not asyncio.run(boot.wait_ended(home, timeout_s=STOP_S)):
            _signal_init(home, signal.SIGKILL)  # which ends every process; the journal is whole
        if not asyncio.run(boot.wait_ended(home, timeout_s=STOP_S)):
            raise RemoteError(
                ErrorKind.DEADLINE,
                f"the system in {home.root} does not end, not even by SIGKILL; "
                f"see {home.logs / 'init.log'}",
            )
        return True

    def fetch(self, name: str, *, progress: bool) -> Path:
        """The folder of a model on the Hugging Face hub, downloaded if need be."""
        try:
            from libllm import hub
        except ModuleNotFoundError as error:
            raise RemoteError(
                ErrorKind.INVALID,
                f"fetching {name} from the hub takes {error.name}: install llmos[serve]",
            ) from None
        return hub.fetch(name, progress=progress)

    def input(self, prompt: str) -> str:
        """A line from the person at the terminal; EOFError at its end."""
        import readline  # noqa: F401  # gives input() its editing and its history

        return input(prompt)


def _signal_init(home: Home, number: int) -> None:
    """For a kernel that does not answer: init itself ends the system at SIGTERM, and with it."""
    try:
        text = (home.run / "pid").read_text().strip()
    except OSError:
        return
    if text.isdigit() and boot.is_running(home):  # so the pid in the file is alive
        try:
            os.kill(int(text), number)
        except (ProcessLookupError, PermissionError):
            return


def kernel_refusal(home: Home, *, since: str) -> str | None:
    """Why the kernel gave up at once, where it has said so since this time (ISO, UTC)."""
    lines = logfiles.last_lines([home.logs / "kernel.log"], 1)
    fields = (lines[0].fields or {}) if lines else {}
    if fields.get("event") != "cannot start" or lines[0].timestamp < since:
        return None
    return f"the kernel cannot start: {fields.get('detail', '')}"


def is_hopeless(row: ProcessRow) -> bool:
    """It was started again and again and is not ready."""
    return row.state is ProcessState.QUARANTINED or (
        row.state is not ProcessState.READY and row.incarnation > STARTS_MAX
    )


def why_hopeless(home: Home, row: ProcessRow) -> str:
    """In the words of its own log, where there are any."""
    lines = logfiles.last_lines([home.logs / f"{row.name}.log"], 1)
    said = f", the last time with: {lines[0].message}" if lines else ""
    return (
        f"{row.name} ended {row.incarnation} times before it was ready{said}; "
        f"see {home.logs / row.name}.log"
    )
