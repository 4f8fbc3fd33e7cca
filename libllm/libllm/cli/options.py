"""Options that several commands share, and the system that a command acts on."""

import contextlib
from typing import TYPE_CHECKING, Annotated, Final

import typer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from libllm.cli.system import Operator, System

HomeOption = Annotated[
    str | None,
    typer.Option("--home", metavar="DIR", help="Home of the system; else LLMOS_HOME or ~/.llmos."),
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print one JSON document (streams: one a line).")
]
ThreadArgument = Annotated[
    str,
    typer.Argument(metavar="ID", help="Of `llmos threads` or `llmos jobs`: 16 hexadecimal digits."),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Any other key, as a recipe has it; may be repeated."
    ),
]
BOOT_S: Final = 60.0


def sets_of(lines: list[str] | None) -> dict[str, object]:
    """`--set training.warmup_steps=10` as keys and values; what is no TOML value is text."""
    import tomllib

    found: dict[str, object] = {}
    for line in lines or ():
        key, equals, text = line.partition("=")
        if not equals or not key.strip():
            raise typer.BadParameter(f"--set {line!r} does not read KEY=VALUE")
        try:
            value: object = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            value = text
        found[key.strip()] = value
    return found


@contextlib.contextmanager
def operating(context: typer.Context, home: str | None) -> "Iterator[Operator]":
    """A connection to the system, which is booted where none runs."""
    from libllm.cli.output import say

    system = system_of(context)
    place = system.home(home)
    if not system.is_running(place):
        say(f"llmos: booting in {place.root}; it stays until `llmos down`")
        system.boot(place, timeout_s=BOOT_S)
    with system.connect(place) as operator:
        yield operator


def system_of(context: typer.Context) -> "System":
    """The system that the caller of the command line gave (tests do), else the real one."""
    from libllm.cli.real import RealSystem

    given: System | None = context.obj
    return RealSystem() if given is None else given
