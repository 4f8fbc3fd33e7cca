"""Commands that act on a process, a thread or a job: kill, stop, cont, nice."""

import re
from typing import Annotated

import typer

from libllm.cli.options import HomeOption, JsonOption, ThreadArgument, system_of
from libllm.cli.output import print_json

_THREAD = re.compile(r"[0-9a-fA-F]{16}")


def kill(
    context: typer.Context,
    target: Annotated[
        str,
        typer.Argument(metavar="NAME|ID", help="A process of `ps`, or the id of a thread or job."),
    ],
    signal: Annotated[
        str, typer.Option("--signal", "-s", help="For a process: its name or number.")
    ] = "KILL",
    home: HomeOption = None,
    json: JsonOption = False,
) -> None:
    """Signal a process, or end a thread or job.

    What becomes of the process is its restart policy's decision.
    """
    number = _signal(signal)
    system = system_of(context)
    with system.connect(system.home(home)) as operator:
        if _THREAD.fullmatch(target):
            operator.cancel(bytes.fromhex(target))
            _tell(json, "cancelled", target)
        else:
            operator.kill(target, signal=number)
            _tell(json, f"signalled ({number})", target)


def stop(
    context: typer.Context,
    thread: ThreadArgument,
    home: HomeOption = None,
    json: JsonOption = False,
) -> None:
    """Suspend a thread or job, which keeps its context."""
    system = system_of(context)
    with system.connect(system.home(home)) as operator:
        operator.suspend(thread_id(thread))
    _tell(json, "suspended", thread)


def cont(
    context: typer.Context,
    thread: ThreadArgument,
    home: HomeOption = None,
    json: JsonOption = False,
) -> None:
    """Let a suspended thread or job go on."""
    system = system_of(context)
    with system.connect(system.home(home)) as operator:
        operator.resume_thread(thread_id(thread))
    _tell(json, "resumed", thread)


def nice(
    context: typer.Context,
    thread: ThreadArgument,
    priority: Annotated[int, typer.Option("--priority", "-n", min=-8, max=7)] = 0,
    service_class: Annotated[
        str | None,
        typer.Option("--class", help="interactive, normal, batch or background; else unchanged."),
    ] = None,
    home: HomeOption = None,
    json: JsonOption = False,
) -> None:
    """Change priority (7 runs first) and class of a thread or job."""
    from libllm.cli.tables import CLASSES

    if service_class is not None and service_class not in CLASSES:
        raise typer.BadParameter(f"--class is one of {', '.join(CLASSES)}")
    number = None if service_class is None else CLASSES.index(service_class)
    system = system_of(context)
    with system.connect(system.home(home)) as operator:
        operator.renice(thread_id(thread), priority, service_class=number)
    _tell(json, f"has priority {priority}", thread)


def thread_id(text: str) -> bytes:
    """The bytes of an id as tables show it."""
    if not _THREAD.fullmatch(text):
        raise typer.BadParameter(
            f"{text!r} is no thread or job: an id has 16 hexadecimal digits, `llmos threads` and "
            "`llmos jobs` show them"
        )
    return bytes.fromhex(text)


def _signal(text: str) -> int:
    import signal

    if text.isdigit() and 1 <= int(text) <= 64:
        return int(text)
    name = text.upper().removeprefix("SIG")
    try:
        return signal.Signals[f"SIG{name}"].value
    except KeyError:
        raise typer.BadParameter(f"{text!r} is no signal, such as TERM or 15") from None


def _tell(json: bool, what: str, target: str) -> None:
    if json:
        print_json({"target": target, "done": what})
    else:
        print(f"{target} {what}")
