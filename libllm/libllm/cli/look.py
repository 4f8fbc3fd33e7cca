"""Commands that only look: ps, threads, models, top."""

import sys
from typing import TYPE_CHECKING, Annotated, Final

import typer

from libllm.cli.options import HomeOption, JsonOption, system_of
from libllm.cli.output import console, duration, print_json, say

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llmproto.versions import VersionRow
    from rich.console import RenderableType

    from libllm.cli.system import Operator

STORE_S: Final = 3.0
"""For how long `models` waits for the store."""


def ps(context: typer.Context, home: HomeOption = None, json: JsonOption = False) -> None:
    """List the processes."""
    from libllm.cli import tables

    system = system_of(context)
    with system.connect(system.home(home)) as operator:
        rows = operator.ps()
    if json:
        print_json(rows)
    else:
        console().print(tables.processes(rows))


def threads(context: typer.Context, home: HomeOption = None, json: JsonOption = False) -> None:
    """List the threads: one for each generation."""
    from libllm.cli import tables

    system = system_of(context)
    with system.connect(system.home(home)) as operator:
        rows = operator.threads()
    if json:
        print_json(rows)
    else:
        console().print(tables.threads(rows))


def models(context: typer.Context, home: HomeOption = None, json: JsonOption = False) -> None:
    """List models, deployments and versions; * marks the default."""
    from libllm.cli import tables

    system = system_of(context)
    with system.connect(system.home(home)) as operator:
        rows = operator.models()
        deployed = operator.deployments()
        versions = _versions(operator)
    if json:
        print_json({"models": rows, "deployments": deployed, "versions": versions})
        return
    console().print(tables.models(rows))
    if deployed:
        console().print(tables.deployments(deployed))
    if versions:
        console().print(tables.versions(versions, deployed))


def _versions(operator: "Operator") -> "Sequence[VersionRow]":
    """What is in the store; where it does not run, the rest is shown all the same."""
    from llmproto.errors import ErrorKind, RemoteError

    try:
        return operator.versions(None, patience_s=STORE_S)
    except RemoteError as error:
        if error.kind not in (ErrorKind.UNAVAILABLE, ErrorKind.DEADLINE):
            raise
        say(f"llmos: no versions are shown, the store does not answer: {error.detail}")
        return []


def top(
    context: typer.Context,
    home: HomeOption = None,
    json: JsonOption = False,
    interval: Annotated[
        float, typer.Option("--interval", "-i", min=0.1, help="Seconds between two looks.")
    ] = 1.0,
    count: Annotated[
        int | None, typer.Option("--count", min=1, help="Looks; without end otherwise.")
    ] = None,
) -> None:
    """Watch processes and threads; Ctrl-C ends it."""
    import contextlib
    import itertools
    import time

    system = system_of(context)
    looks = itertools.count() if count is None else iter(range(count))
    with system.connect(system.home(home)) as operator:
        if json or not sys.stdout.isatty():
            out = console()
            for number in looks:
                if number:
                    time.sleep(interval)
                if json:
                    print_json(_snapshot(operator))
                else:
                    out.print(_screen(operator))
            return
        from rich.live import Live

        with (
            contextlib.suppress(KeyboardInterrupt),
            Live(console=console(), screen=True, auto_refresh=False) as live,
        ):
            for number in looks:
                if number:
                    time.sleep(interval)
                live.update(_screen(operator), refresh=True)


def _snapshot(operator: "Operator") -> dict[str, object]:
    return {
        "status": operator.status(),
        "processes": operator.ps(),
        "threads": operator.threads(),
    }


def _screen(operator: "Operator") -> "RenderableType":
    from rich.console import Group
    from rich.text import Text

    from libllm.cli import tables

    status = operator.status()
    living = [row for row in operator.threads() if row.state.value != "ended"]
    head = (
        f"llmos {status.version}: {'ready' if status.ready else 'not ready'}, kernel up "
        f"{duration(status.uptime_ms)}; threads: {status.threads_running} running, "
        f"{status.threads_queued} queued; {status.tokens_committed} tokens"
    )
    return Group(
        Text(head, style="bold"),
        Text(),
        tables.processes(operator.ps()),
        Text(),
        tables.threads(living),
    )
