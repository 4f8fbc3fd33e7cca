"""A service that tells the test what it was started with, then does what it is told."""

import json
import os
import signal
import socket
import subprocess
import sys

GRANDCHILD = "import signal\nwhile True: signal.pause()"


def spawn(*, session: bool) -> int:
    """A grandchild that waits for ever, holding neither lifeline nor death signal; its pid."""
    command = [sys.executable, "-c", GRANDCHILD]
    quiet = subprocess.DEVNULL
    return subprocess.Popen(command, stdout=quiet, stderr=quiet, start_new_session=session).pid


def main() -> None:
    """Until told to end."""
    proof = os.read(int(os.environ["LLMOS_PROOF_FD"]), 64)
    test = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    open_files = sorted(int(name) for name in os.listdir("/proc/self/fd"))
    told = {
        "pid": os.getpid(),
        "parent": os.getppid(),
        "session": os.getsid(0),
        "name": os.environ["LLMOS_PROCESS"],
        "incarnation": int(os.environ["LLMOS_INCARNATION"]),
        "proof": proof.hex(),
        "arguments": sys.argv[1:],
        "cores": sorted(os.sched_getaffinity(0)),
        "nice": os.nice(0),
        "descriptors": open_files,
        "imported": "fractions" in sys.modules,
        "init_fd": os.environ.get("LLMOS_INIT_FD"),
    }
    test.connect(os.path.join(os.environ["LLMOS_HOME"], "run", "report"))
    test.send(json.dumps(told).encode())
    print("says hello", flush=True)
    while word := test.recv(64):
        if word == b"spawn":
            test.send(str(spawn(session=False)).encode())
        elif word == b"daemon":
            test.send(str(spawn(session=True)).encode())
        elif word == b"deaf":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            test.send(b"done")
        elif word == b"exit":
            sys.exit(7)
        elif word == b"raise":
            raise RuntimeError("as told")
    while True:
        signal.pause()


if __name__ == "__main__":
    main()
