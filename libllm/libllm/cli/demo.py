"""The command `demo`: a stream that outlives its executor and its kernel."""

import typer

from libllm.cli.options import JsonOption, system_of


def demo(context: typer.Context, json: JsonOption = False) -> None:
    """Kill executor and kernel under a stream, which goes on.

    Boots the embedded model in a temporary home, kills with SIGKILL in mid-stream, compares the
    text with that of an undisturbed run, and leaves nothing behind. Takes less than half a minute.
    """
    import signal

    from libllm.cli import performance
    from libllm.cli.output import console, print_json

    for number in (signal.SIGTERM, signal.SIGHUP):  # Cleans up as after Ctrl-C.
        signal.signal(number, signal.default_int_handler)
    report = performance.demonstrate(
        system_of(context), performance.Stage(None if json else console())
    )
    if json:
        print_json(report)
