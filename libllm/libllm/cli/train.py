"""Commands on jobs: train, attach, jobs, eval."""

from typing import TYPE_CHECKING, Annotated

import typer

from libllm.cli.options import (
    HomeOption,
    JsonOption,
    SetOption,
    operating,
    sets_of,
    system_of,
)
from libllm.cli.output import console, print_json, refuse, say

if TYPE_CHECKING:
    from libllm.cli.system import Running

DetachOption = Annotated[
    bool, typer.Option("--detach", "-d", help="Print the job's id and leave it to itself.")
]


def train(
    context: typer.Context,
    recipe: Annotated[
        str | None, typer.Argument(metavar="[RECIPE.toml]", help="Flags go over what it says.")
    ] = None,
    base: Annotated[
        str | None,
        typer.Option("--base", metavar="PATH|NAME", help="What to train further."),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option("--data", metavar="FILE", help="Training data; may be repeated."),
    ] = None,
    validation: Annotated[
        list[str] | None, typer.Option("--validation", metavar="FILE", help="May be repeated.")
    ] = None,
    method: Annotated[
        str | None, typer.Option("--method", help="full (the default), lora or pretrain.")
    ] = None,
    task: Annotated[
        str | None, typer.Option("--task", help="generate (the default), classify or regress.")
    ] = None,
    name: Annotated[
        str | None, typer.Option("--name", help="Of the versions that it makes.")
    ] = None,
    epochs: Annotated[
        float | None, typer.Option("--epochs", help="Else 1, unless --steps is given.")
    ] = None,
    steps: Annotated[int | None, typer.Option("--steps", help="Optimiser steps.")] = None,
    batch: Annotated[int | None, typer.Option("--batch", help="Sequences a step.")] = None,
    learning_rate: Annotated[float | None, typer.Option("--lr", help="Learning rate.")] = None,
    processes: Annotated[
        int | None, typer.Option("--processes", help="Ranks that share each batch.")
    ] = None,
    deploy: Annotated[
        bool, typer.Option("--deploy", help="Serve the result under its name.")
    ] = False,
    gate: Annotated[
        str | None,
        typer.Option("--if", metavar="GATE", help="Deploy only where accuracy>=0.87, say."),
    ] = None,
    sets: SetOption = None,
    detach: DetachOption = False,
    home: HomeOption = None,
    json: JsonOption = False,
) -> None:
    """Train a model; boots if nothing is up.

    Ctrl-C leaves the job to itself; `llmos attach` comes back to it. The result is a version
    of the store: `llmos models` shows it, `llmos run` runs it.
    """
    from pathlib import Path

    from libllm.recipes import recipe_of

    given = None if recipe is None else Path(recipe)
    flags = {
        "base": base,
        "data": data or None,
        "validation": validation or None,
        "method": method,
        "task": task,
        "name": name,
        "epochs": epochs,
        "steps": steps,
        "batch": batch,
        "learning_rate": learning_rate,
        "processes": processes,
        "deploy": True if deploy else None,
        "gate": gate,
        "sets": sets_of(sets) or None,
    }
    if given is None and not any(value is not None for value in flags.values()):
        raise typer.BadParameter("give a recipe.toml, or flags: --base, --data and --name")
    wanted = recipe_of(given, flags)  # type: ignore[arg-type]  # a dict of exactly these keys
    with operating(context, home) as operator:
        show(operator.train(wanted), detach=detach, json=json)


def attach(
    context: typer.Context,
    job: Annotated[str, typer.Argument(metavar="JOB", help="Id of a job, of `llmos jobs`.")],
    home: HomeOption = None,
    json: JsonOption = False,
) -> None:
    """Watch a job until its end; Ctrl-C leaves it to itself again."""
    system = system_of(context)
    with system.connect(system.home(home)) as operator:
        show(operator.job(job), detach=False, json=json)


def jobs(context: typer.Context, home: HomeOption = None, json: JsonOption = False) -> None:
    """List training and evaluation runs.

    Those that have ended stay for a day.
    """
    from libllm.cli import tables

    system = system_of(context)
    with system.connect(system.home(home)) as operator:
        rows = operator.jobs()
    if json:
        print_json(rows)
    else:
        console().print(tables.jobs(rows))


def evaluate(
    context: typer.Context,
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A name, a version (name@digest), or a folder.")
    ],
    data: Annotated[
        list[str], typer.Option("--data", metavar="FILE", help="What to judge it on; repeatable.")
    ],
    metrics: Annotated[
        str, typer.Option("--metrics", metavar="A,B", help="Such as accuracy,f1 or perplexity.")
    ] = "loss",
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", min=1, help="Of each generated answer.")
    ] = 256,
    record: Annotated[
        bool, typer.Option("--record/--no-record", help="Keep the results with the version.")
    ] = True,
    sets: SetOption = None,
    detach: DetachOption = False,
    home: HomeOption = None,
    json: JsonOption = False,
) -> None:
    """Judge a model on data; boots if nothing is up."""
    from libllm.recipes import evaluation_of

    names = [part.strip() for part in metrics.split(",") if part.strip()]
    wanted = evaluation_of(
        model, data, names, output_tokens_max=max_tokens, record=record, sets=sets_of(sets)
    )
    with operating(context, home) as operator:
        job = operator.evaluate(
            model,
            data=wanted.data,
            metrics=wanted.metrics,
            output_tokens_max=max_tokens,
            record=record,
        )
        show(job, detach=detach, json=json)


def show(job: "Running", *, detach: bool, json: bool) -> None:
    """Follow the job to its end and tell what it came to; Ctrl-C leaves it to itself."""
    from libllm.cli.progress import follow

    number = job.id.hex()
    if detach:
        print_json({"job": number}) if json else print(number)
        return
    if not json:
        say(f"job {number}; Ctrl-C detaches")
    try:
        row = follow(job, json=json)
    except KeyboardInterrupt:
        refuse(f"detached; the job goes on: `llmos attach {number}`, `llmos kill {number}`")
        raise
    _tell(job, json=json, took_ms=row.age_ms)


def _tell(job: "Running", *, json: bool, took_ms: int) -> None:
    """The end; RemoteError where the job failed."""
    from libllm.cli.output import duration

    result = job.result()
    if json:
        return
    if result.reference is not None:
        print(f"{result.reference} is made, after {duration(took_ms)}")
    width = max((len(name) for name in result.metrics), default=0)
    for name, value in sorted(result.metrics.items()):
        print(f"  {name:<{width}}  {value:.6g}")
