"""The table of commands, and the one place that turns refusals into exit codes.

Exit codes: 0 done, 1 refused or failed, 2 wrong usage, 130 interrupted.  A traceback is a bug.
"""

from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer
from llmproto.errors import ErrorKind, RemoteError
from typer.core import TyperGroup

from libllm.cli import act, bench, data, demo, keys, logs, look, power, run, shelf, train, versions
from libllm.cli.output import refuse
from libllm.version import __version__


class Commands(TyperGroup):
    """Runs a command, and says on one line why it was refused."""

    def list_commands(self, ctx: Any) -> list[str]:  # Any: typer's context has no public name
        """In the order of the table below, not of the alphabet."""
        return list(self.commands)

    def invoke(self, ctx: Any) -> Any:  # as in the base class
        """The command's result."""
        try:
            return super().invoke(ctx)
        except RemoteError as error:
            refuse(describe(error))
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            raise typer.Exit(130) from None


def describe(error: RemoteError) -> str:
    """One line: kind, what happened, when a retry makes sense."""
    detail = " ".join(error.detail.split())
    line = f"{error.kind.value}: {detail}"
    if error.retry_after_ms is not None:
        line += f" (try again in {error.retry_after_ms} ms)"
    if error.kind is ErrorKind.INTERNAL:
        line += "; `llmos logs` tells more, please report it"
    return line


app = typer.Typer(
    name="llmos",
    cls=Commands,
    help="An operating system for language models.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"llmos {__version__}")
        raise typer.Exit


@app.callback()
def llmos(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version.", callback=_version, is_eager=True),
    ] = False,
) -> None:
    """An operating system for language models."""


COMMANDS: Sequence[Callable[..., None]] = (
    *(power.up, power.down, power.status, demo.demo, run.run),
    *(look.ps, look.threads, look.top, logs.logs, look.models),
    *(shelf.add, shelf.rm, shelf.load),
    *(versions.export, versions.tag, versions.untag, versions.verify, versions.gc),
    *(versions.deploy, versions.undeploy, versions.rollback),
    *(train.train, train.attach, train.jobs),
    *(act.kill, act.stop, act.cont, act.nice),
)
for command in COMMANDS:
    app.command()(command)
app.command(name="import")(versions.import_)
app.command(name="eval")(train.evaluate)
app.command(context_settings={"ignore_unknown_options": True})(bench.bench)
app.add_typer(data.app, name="data")
app.add_typer(keys.app, name="keys")
