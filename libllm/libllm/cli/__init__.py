"""The command line: what a person, or a script with --json, does with a system.

`app` is the table of commands and the one place that turns refusals into exit codes; one file a
group of commands. What is slow to import is imported inside the bodies, so that `--help` is fast.
"""

from libllm.cli.app import app


def main() -> None:
    """Run the command that the arguments name; never returns."""
    app(prog_name="llmos")
