"""Commands on the model table: add, rm, load."""

from typing import Annotated

import typer

from libllm.cli.options import HomeOption, JsonOption, system_of
from libllm.cli.output import print_json


def add(
    context: typer.Context,
    path: Annotated[str, typer.Argument(metavar="PATH", help="A model folder.")],
    name: Annotated[
        str | None, typer.Option("--name", help="Name in the table; else the folder's.")
    ] = None,
    home: HomeOption = None,
    json: JsonOption = False,
) -> None:
    """Put a model folder into the table.

    The folder has the form of a Hugging Face repository, with its weights in safetensors.
    """
    from libllm.cli.lookup import folder_of

    system = system_of(context)
    folder = folder_of(path)
    with system.connect(system.home(home)) as operator:
        added = operator.add_model(folder, name)
    if json:
        print_json({"name": added.name, "path": str(folder), "task": added.task})
    else:
        print(f"added {added.name} ({added.task})")


def rm(
    context: typer.Context,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A name of `llmos models`.")],
    home: HomeOption = None,
    json: JsonOption = False,
) -> None:
    """Take a model out of the table.

    Its files stay, and its threads go on to their end.
    """
    system = system_of(context)
    with system.connect(system.home(home)) as operator:
        operator.remove_model(model)
    if json:
        print_json({"name": model})
    else:
        print(f"removed {model}")


def load(
    context: typer.Context,
    model: Annotated[
        str | None,
        typer.Argument(metavar="[MODEL]", help="A name of `llmos models`; else the default."),
    ] = None,
    home: HomeOption = None,
    json: JsonOption = False,
) -> None:
    """Start loading a model now, before its first thread."""
    system = system_of(context)
    with system.connect(system.home(home)) as operator:
        operator.load_model(model)
    if json:
        print_json({"name": model})
    else:
        print(f"loading {model or 'the default model'}")
