"""The command `demo`: a stream that outlives its executor and its kernel; with `train` a model that
is trained while it serves."""

from enum import StrEnum
from typing import Annotated

import typer

from libllm.cli.options import JsonOption, system_of


class What(StrEnum):
    """What can be shown."""

    SERVE = "serve"
    TRAIN = "train"


def demo(
    context: typer.Context,
    what: Annotated[What, typer.Argument(metavar="[train]")] = What.SERVE,
    json: JsonOption = False,
) -> None:
    """Kill executor and kernel under a stream, which goes on.

    Boots the embedded model in a temporary home, kills with SIGKILL in mid-stream, compares the
    text with that of an undisturbed run, and leaves nothing behind. Takes less than half a minute.

    With `train`: trains it while it serves, kills the trainer in the middle, swaps the result in
    under running streams, and compares losses and texts with undisturbed ones. About a minute.
    """
    import signal

    from libllm.cli import demo_train, performance
    from libllm.cli.output import console, print_json

    for number in (signal.SIGTERM, signal.SIGHUP):  # Cleans up as after Ctrl-C.
        signal.signal(number, signal.default_int_handler)
    stage = performance.Stage(None if json else console())
    show = performance.demonstrate if what is What.SERVE else demo_train.demonstrate
    report = show(system_of(context), stage)
    if json:
        print_json(report)
