"""`python -m llmkernel [--standby]`: the kernel process, started by init only."""

import asyncio
import os
import sys
import time
from collections.abc import Callable

import msgspec
import uvloop
from libllm.config import Home, ProcessEnvironment, SystemConfig
from llmproto import init
from llmproto.errors import RemoteError
from llmproto.operation import DeviceRow

from libllm import logs
from llmkernel import turns
from llmkernel.boot import core_config
from llmkernel.compaction import Compaction
from llmkernel.core import Kernel
from llmkernel.devices import detect
from llmkernel.events import KernelConfig, Restarted
from llmkernel.initlink import Link
from llmkernel.jobwork import RENDEZVOUS
from llmkernel.journal import Journal, Options
from llmkernel.rejected import read_rejected
from llmkernel.remote import open_door
from llmkernel.shell import Clock, Shell
from llmkernel.standby import await_promotion
from llmkernel.state import State
from llmkernel.trace import Trace

BEAT_S = 0.25
"""Replay beats so often, however long its records are."""


class Parts(msgspec.Struct, frozen=True):
    """What a kernel's process is put together from."""

    kernel: type[Kernel] = Kernel
    shell: type[Shell] = Shell
    state: type[State] = State
    configure: Callable[[KernelConfig], KernelConfig] = lambda config: config
    """Has the last word on what the core is told."""


class Synced:
    """Carries the journal's thread's word onto the loop, once there is one."""

    def __init__(self) -> None:
        self.shell: Shell | None = None
        self.loop: asyncio.AbstractEventLoop | None = None

    def __call__(self, position: int) -> None:
        """Called by the journal's thread."""
        if self.loop is not None and self.shell is not None:
            self.loop.call_soon_threadsafe(self.shell.synced, position)


def replay(
    home: Home, config: SystemConfig, link: Link, on_synced: Synced, state: State
) -> Journal:
    """Bring the state up to date, beating all the while."""
    options = Options(
        sync=config.kernel.sync,
        bytes_max=config.kernel.journal_bytes_max,
        on_synced=on_synced if config.kernel.sync == "always" else None,
    )
    journal, records = Journal.open(home.journal, options)
    beat_s = 0.0
    for record in records:
        for fact in turns.decode(record):
            state.apply(fact)
        if (now_s := time.monotonic()) - beat_s > BEAT_S:
            beat_s = now_s
            link.send(init.KernelBeat())
    return journal


async def serve(
    environment: ProcessEnvironment,
    link: Link,
    promoted: init.Promoted,
    since: list[init.InitMessage],
    logger: logs.Logger,
    devices: tuple[DeviceRow, ...],
    parts: Parts,
) -> None:
    """Be the kernel until told to end; `since` is what init has said after the promotion."""
    started = time.monotonic()
    home = environment.home
    config = SystemConfig.read(home.config)
    synced = Synced()
    state = parts.state()
    journal = replay(home, config, link, synced, state)
    for notice in journal.notices:
        logger.warning("journal", notice=notice)
    shell = parts.shell(
        parts.kernel(state),
        journal=journal,
        clock=Clock(state.now_ns),
        link=link,
        home=home,
        logger=logger,
        wait_for_sync=config.kernel.sync == "always",
        compaction=Compaction(journal, state, journal_bytes_max=config.kernel.journal_bytes_max),
        trace=(
            Trace(home.run / f"trace-{state.epoch + 1}.bin", state) if config.kernel.trace else None
        ),
    )
    synced.shell, synced.loop = shell, asyncio.get_running_loop()
    first = Restarted(
        epoch=state.epoch + 1,
        boot_id=promoted.boot_id,
        wall_ns=time.time_ns(),
        config=parts.configure(core_config(home, config, devices)),
        devices=devices,
        children=tuple(promoted.children),
        exits=tuple(promoted.exits),
        rejected=read_rejected(
            home.journal / "rejected", forget_processes=promoted.kernel_incarnation == 1
        ),
        pid=os.getpid(),
        init_pid=os.getppid(),
        kernel_starts=promoted.kernel_incarnation,
    )
    logger.info(
        "replayed",
        epoch=first.epoch,
        threads=len(state.threads),
        children=len(first.children),
        ms=int((time.monotonic() - started) * 1000),
    )
    for exit in promoted.exits:  # nobody is struck for a death that no kernel saw
        home.crash_note(exit.name, exit.incarnation).unlink(missing_ok=True)
    if promoted.kernel_incarnation == 1:
        for path in home.run.glob(f"{RENDEZVOUS}*"):  # of attempts before this boot
            path.unlink(missing_ok=True)
    heard = [event for message in since for event in shell.events_of(message)]
    door = open_door(home, config.kernel.listen)
    await shell.run(home.socket, [first, *heard], door=door)
    journal.close()


def main(parts: Parts) -> None:
    """Wait for promotion, then be the kernel."""
    environment = ProcessEnvironment.read()
    logger = logs.configure("kernel")
    assert environment.init_fd is not None, "the kernel is started by init"
    link = Link.inherited(environment.init_fd)
    devices = tuple(detect())  # a GPU's driver may take its time: a standby has that behind it
    promoted, since = await_promotion(link, environment.lifeline_fd)
    link.send(init.KernelBeat())
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(serve(environment, link, promoted, since, logger, devices, parts))
    except RemoteError as error:
        logger.critical("cannot start", kind=error.kind.value, detail=error.detail)
        sys.exit(78)
    except Exception:
        logger.critical("broken", exc_info=True)
        sys.exit(70)


if __name__ == "__main__":
    main(Parts())
