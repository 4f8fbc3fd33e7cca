"""`python -m llmkernel.init --home HOME [--foreground]`: the first process of a system.

Exit codes: 0 after an orderly end, 2 for a home that cannot be used, 3 for one that is in use; each
of these with one line on standard error.  Without --foreground it becomes a session of its own and
its standard error moves to logs/init.log once the home is claimed: a parent that reads a pipe there
sees its end.
"""

import argparse
import os
import resource
import sys
from pathlib import Path

from libllm.config import Home
from llmproto.errors import RemoteError

from llmkernel.init import lifeline
from llmkernel.init.home import Claim, HeldElsewhere
from llmkernel.init.loop import Init, Programs
from llmkernel.init.oom import OomCount

FILES_MAX = 65_536


def main(arguments: list[str], programs: Programs) -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(prog="llmkernel.init")
    parser.add_argument("--home")
    parser.add_argument("--foreground", action="store_true")
    options = parser.parse_args(arguments)
    os.umask(0o077)
    try:
        claim = Claim(Home.find(options.home))
    except RemoteError as error:
        print(f"llmos: {error.detail}", file=sys.stderr)
        return 2
    except HeldElsewhere as error:
        print(f"llmos: {error}", file=sys.stderr)
        return 3
    _raise_file_limit()
    lifeline.become_subreaper()
    if not options.foreground:
        _detach(claim.home.logs / "init.log")
    Init(claim, OomCount(Path("/")), programs).run()
    return 0


def _raise_file_limit() -> None:
    """The kernel holds a descriptor for each of its sessions; children inherit the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = FILES_MAX if hard == resource.RLIM_INFINITY else min(hard, FILES_MAX)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _detach(log: Path) -> None:
    if os.getpid() != os.getsid(0):
        os.setsid()
    nothing = os.open(os.devnull, os.O_RDONLY)
    output = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    for source, target in ((nothing, 0), (output, 1), (output, 2)):
        os.dup2(source, target)
    os.close(nothing)
    os.close(output)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], Programs()))
