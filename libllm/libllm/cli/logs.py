"""The command that reads the logs; works on a system that is down as well."""

from typing import TYPE_CHECKING, Annotated

import typer

from libllm.cli.options import HomeOption, JsonOption, system_of
from libllm.cli.output import print_json

if TYPE_CHECKING:
    from libllm.cli.logfiles import LogLine


def logs(
    context: typer.Context,
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="[NAME]...", help="Processes (`executor`: all of them); else all."),
    ] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on as lines come.")] = False,
    lines: Annotated[int, typer.Option("--lines", "-n", min=0, help="Last lines to show.")] = 50,
    home: HomeOption = None,
    json: JsonOption = False,
) -> None:
    """Show the last lines of the logs, in the order of time (UTC)."""
    from libllm.cli import logfiles

    folder = system_of(context).home(home).logs
    wanted = names or []
    follower = logfiles.Follower(lambda: logfiles.files(folder, wanted)) if follow else None
    for line in logfiles.last_lines(logfiles.files(folder, wanted), lines):
        _show(line, json)
    if follower is not None:
        for line in logfiles.follow(follower):
            _show(line, json)


def _show(line: "LogLine", json: bool) -> None:
    if json:
        print_json(line.document())
    else:
        print(line.text(), flush=True)
