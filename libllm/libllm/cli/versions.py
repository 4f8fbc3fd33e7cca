"""Commands on versions and deployments: import, export, tag, untag, verify, gc, deploy, undeploy,
rollback."""

from typing import Annotated

import typer

from libllm.cli.options import HomeOption, JsonOption, operating, system_of
from libllm.cli.output import print_json, say

Reference = Annotated[
    str, typer.Argument(metavar="REF", help="NAME (its newest), NAME:TAG, NAME@DIGEST or @DIGEST.")
]
DeploymentName = Annotated[str, typer.Argument(metavar="NAME", help="A name that is deployed.")]
WaitOption = Annotated[
    bool, typer.Option("--wait/--no-wait", help="Until it serves, or cannot be loaded.")
]


def import_(
    context: typer.Context,
    path: Annotated[str, typer.Argument(metavar="FOLDER", help="A model folder.")],
    name: Annotated[str, typer.Argument(metavar="NAME", help="What it is a version of.")],
    base: Annotated[
        str | None, typer.Option("--base", metavar="REF", help="Of a peft adapter.")
    ] = None,
    home: HomeOption = None,
    json: JsonOption = False,
) -> None:
    """Copy a Hugging Face folder into the store.

    Boots if nothing is up.
    """
    from libllm.cli.lookup import folder_of
    from libllm.cli.output import size

    folder = folder_of(path)
    with operating(context, home) as operator:
        saved = operator.import_version(folder, name, base=base)
    if json:
        print_json(saved)
    else:
        print(f"{saved.reference}: {size(saved.bytes)}, {size(saved.bytes_new)} of it new")
        for name in saved.left_out:
            print(f"left out: {name}")


def export(
    context: typer.Context,
    reference: Reference,
    path: Annotated[str, typer.Argument(metavar="FOLDER", help="New, or empty.")],
    merge: Annotated[
        bool, typer.Option("--merge/--adapter", help="Of an adapter: merged, or alone.")
    ] = True,
    home: HomeOption = None,
    json: JsonOption = False,
) -> None:
    """Write a version as a plain Hugging Face folder."""
    system = system_of(context)
    with system.connect(system.home(home)) as operator:
        operator.export_version(reference, path, merge=merge)
    _tell(json, {"reference": reference, "path": path}, f"{reference} is in {path}")


def tag(
    context: typer.Context,
    reference: Reference,
    name: Annotated[str, typer.Argument(metavar="TAG")],
    expect: Annotated[
        str | None,
        typer.Option(
            "--expect",
            metavar="REF",
            help="Only if it stands on this version now (`-`: on none).",
        ),
    ] = None,
    home: HomeOption = None,
    json: JsonOption = False,
) -> None:
    """Let a tag stand on a version, wherever it stood before."""
    from libllm.versions import ANY_TAG

    expected = ANY_TAG if expect is None else None if expect == "-" else expect
    system = system_of(context)
    with system.connect(system.home(home)) as operator:
        operator.tag(reference, name, expect=expected)
    _tell(json, {"reference": reference, "tag": name}, f"{name} stands on {reference}")


def untag(
    context: typer.Context,
    reference: Annotated[str, typer.Argument(metavar="NAME:TAG")],
    home: HomeOption = None,
    json: JsonOption = False,
) -> None:
    """Remove a tag."""
    name, colon, found = reference.rpartition(":")
    if not colon or not name or not found:
        raise typer.BadParameter(f"{reference!r} does not read NAME:TAG")
    system = system_of(context)
    with system.connect(system.home(home)) as operator:
        operator.untag(name, found)
    _tell(json, {"name": name, "tag": found}, f"{reference} is removed")


def verify(
    context: typer.Context,
    reference: Annotated[
        str | None, typer.Argument(metavar="[REF]", help="Else every version.")
    ] = None,
    home: HomeOption = None,
    json: JsonOption = False,
) -> None:
    """Read every object and compare it with its name.

    The exit code is 1 where one is damaged.
    """
    from libllm.cli.output import size

    system = system_of(context)
    with system.connect(system.home(home)) as operator:
        found = operator.verify(reference)
    if json:
        print_json(found)
    else:
        for damage in found.damage:
            what = " ".join(part for part in (damage.file, damage.tensor) if part)
            print(f"{damage.reference}: {what}: {damage.detail} ({damage.object})")
        print(
            f"{found.versions} versions, {found.objects} objects, {size(found.bytes)}: "
            + (f"{len(found.damage)} damaged" if found.damage else "all is well")
        )
    if found.damage:
        raise typer.Exit(1)


def gc(context: typer.Context, home: HomeOption = None, json: JsonOption = False) -> None:
    """Remove what no version needs from the store."""
    from libllm.cli.output import size

    system = system_of(context)
    with system.connect(system.home(home)) as operator:
        found = operator.collect()
    if json:
        print_json(found)
    else:
        print(
            f"removed {found.objects} objects, {size(found.bytes)}, and {found.versions} "
            "superseded checkpoints"
        )


def deploy(
    context: typer.Context,
    reference: Reference,
    name: Annotated[
        str | None, typer.Option("--name", help="Serve it under this name; else the version's.")
    ] = None,
    replicas: Annotated[int, typer.Option("--replicas", min=1, max=64)] = 1,
    device: Annotated[
        str | None, typer.Option("--device", help="A device of `llmos status`, or a kind of it.")
    ] = None,
    gate: Annotated[
        str,
        typer.Option(
            "--if", metavar="GATE", help="Only if its metrics are good enough: accuracy>=0.87"
        ),
    ] = "",
    wait: WaitOption = True,
    home: HomeOption = None,
    json: JsonOption = False,
) -> None:
    """Let a name serve a version; boots if nothing is up.

    New requests get it as soon as it is loaded; those that run end on what they began with. A
    version that is damaged is refused; one that cannot be loaded is taken back.
    """
    with operating(context, home) as operator:
        done = operator.deploy(
            reference, name=name, replicas=replicas, device=device, gate=gate, wait=wait
        )
    _tell(json, done, f"{done.name} {_serves(wait=wait)} {done.model}")


def undeploy(
    context: typer.Context,
    name: DeploymentName,
    home: HomeOption = None,
    json: JsonOption = False,
) -> None:
    """Let a name serve nothing; its threads go on to their end."""
    system = system_of(context)
    with system.connect(system.home(home)) as operator:
        operator.undeploy(name)
    _tell(json, {"name": name}, f"{name} serves nothing")


def rollback(
    context: typer.Context,
    name: DeploymentName,
    wait: WaitOption = True,
    home: HomeOption = None,
    json: JsonOption = False,
) -> None:
    """Let a name serve what it served before.

    Where it served nothing before, it gets the parent of what it serves.
    """
    system = system_of(context)
    with system.connect(system.home(home)) as operator:
        done = operator.rollback(name, wait=wait)
    _tell(json, done, f"{done.name} {_serves(wait=wait)} {done.model}")


def _serves(*, wait: bool) -> str:
    if wait:
        return "serves"
    say("it is being loaded: `llmos models` shows when it serves")
    return "is to serve"


def _tell(json: bool, document: object, line: str) -> None:
    if json:
        print_json(document)
    else:
        print(line)
