"""Commands on API keys: keys add, keys list, keys rm."""

from typing import Annotated

import typer

from libllm.cli.options import HomeOption, JsonOption, system_of
from libllm.cli.output import console, print_json, say

app = typer.Typer(
    help="API keys of the HTTP gateway; each is a tenant.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="Name of the key.")]


@app.command()
def add(
    context: typer.Context,
    name: NameArgument,
    operator: Annotated[
        bool, typer.Option("--operator", help="It may operate the system as well.")
    ] = False,
    home: HomeOption = None,
    json: JsonOption = False,
) -> None:
    """Make a key and print it, once: the system keeps a digest only."""
    system = system_of(context)
    with system.connect(system.home(home)) as connection:
        key = connection.add_key(name, operator=operator)
    if json:
        print_json({"name": name, "key": key, "operator": operator})
    else:
        say(f"The key of {name}; it cannot be shown again:")
        print(key)


@app.command("list")
def list_keys(context: typer.Context, home: HomeOption = None, json: JsonOption = False) -> None:
    """List the keys by name."""
    from libllm.cli import tables

    system = system_of(context)
    with system.connect(system.home(home)) as connection:
        rows = connection.keys()
    if json:
        print_json(rows)
    else:
        console().print(tables.keys(rows))


@app.command()
def rm(
    context: typer.Context, name: NameArgument, home: HomeOption = None, json: JsonOption = False
) -> None:
    """Accept a key no longer."""
    system = system_of(context)
    with system.connect(system.home(home)) as connection:
        connection.remove_key(name)
    if json:
        print_json({"name": name})
    else:
        print(f"removed {name}")
