"""Options that several commands share, and the system that a command acts on."""

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from libllm.cli.system import System

HomeOption = Annotated[
    str | None,
    typer.Option("--home", metavar="DIR", help="Home of the system; else LLMOS_HOME or ~/.llmos."),
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print one JSON document (streams: one a line).")
]
ThreadArgument = Annotated[
    str, typer.Argument(metavar="THREAD", help="Id of a thread, as `llmos threads` shows it.")
]


def system_of(context: typer.Context) -> "System":
    """The system that the caller of the command line gave (tests do), else the real one."""
    from libllm.cli.real import RealSystem

    given: System | None = context.obj
    return RealSystem() if given is None else given
