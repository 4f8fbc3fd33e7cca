"""Commands on the system as a whole: up, down, status."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from libllm.cli.options import HomeOption, JsonOption, system_of
from libllm.cli.output import print_json
from libllm.version import __version__

if TYPE_CHECKING:
    from llmproto.models import ModelRow
    from llmproto.operation import Status

    from libllm.config import Home


def up(
    context: typer.Context,
    foreground: Annotated[
        bool, typer.Option("--foreground", help="Stay attached; SIGTERM or Ctrl-C ends the system.")
    ] = False,
    timeout: Annotated[
        float, typer.Option("--timeout", min=1, help="Seconds until everything must be ready.")
    ] = 60.0,
    home: HomeOption = None,
    json: JsonOption = False,
) -> None:
    """Boot the system and tell where it is reached."""
    system = system_of(context)
    place = system.home(home)
    if foreground:
        system.become(place)
    booted = system.boot(place, timeout_s=timeout)
    with system.connect(place) as operator:
        status, models = operator.status(), operator.models()
    if json:
        print_json({**address(place, status, models), "booted": booted})
        return
    print(f"llmos {__version__} {'runs' if booted else 'runs already'} in {place.root}")
    print(f"  socket   {place.endpoint}")
    print(f"  http     {_base_url(status) or 'none'}")
    for line in _model_lines(models):
        print(line)


def down(context: typer.Context, home: HomeOption = None, json: JsonOption = False) -> None:
    """Stop the system; its threads go on at the next boot."""
    system = system_of(context)
    place = system.home(home)
    stopped = system.stop(place)
    if json:
        print_json({"home": str(place.root), "stopped": stopped})
    elif stopped:
        print(f"llmos in {place.root} has ended")
    else:
        print(f"no system runs in {place.root}")


def status(context: typer.Context, home: HomeOption = None, json: JsonOption = False) -> None:
    """Tell how the system is.

    Exit code 1 where something is not ready.
    """
    from libllm.cli import measures, tables
    from libllm.cli.output import plain

    system = system_of(context)
    place = system.home(home)
    with system.connect(place) as operator:
        found = operator.status()
        watched = any(row.role == "monitor" and row.state == "ready" for row in operator.ps())
        numbers = measures.read(operator.metrics()) if watched else []
    if json:
        described = plain(found)
        assert isinstance(described, dict)
        print_json({"home": str(place.root), **described, "metrics": measures.document(numbers)})
    else:
        for line in [*tables.status(found, str(place.root)), *measures.lines(numbers)]:
            print(line)
    if not found.ready:
        raise typer.Exit(1)


def address(home: "Home", status: "Status", models: "Sequence[ModelRow]") -> dict[str, object]:
    """Where the system is reached, for programs."""
    return {
        "home": str(home.root),
        "socket": home.endpoint,
        "http": _base_url(status),
        "version": status.version,
        "ready": status.ready,
        "default_model": status.default_model,
        "models": [row.model.name for row in models],
    }


def _base_url(status: "Status") -> str:
    """What an OpenAI client takes as its base URL."""
    return f"{status.http.rstrip('/').removesuffix('/v1')}/v1" if status.http else ""


def _model_lines(models: "Sequence[ModelRow]") -> list[str]:
    if not models:
        return ["  models   none; `llmos add PATH` or `llmos run ORG/NAME` brings one"]
    states = [
        f"{row.model.name} ({row.state.value}{', default' if row.default else ''})"
        for row in models
    ]
    return [f"  {'models' if not index else '':<8} {text}" for index, text in enumerate(states)]
