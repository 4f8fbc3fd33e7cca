"""A kernel without a mind: passes datagrams between init and a socket that the test listens on.

It beats by itself until the test says `mute`.
"""

import json
import os
import select
import socket
import sys

BEAT_S = 0.1


def main() -> None:
    """Until init or the test is gone."""
    init = socket.socket(fileno=int(os.environ["LLMOS_INIT_FD"]))
    # What a standby waits for.  Whoever watches sees a promotion as a new connection.
    promoted = init.recv(1 << 16) if "--standby" in sys.argv else b""
    test = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    test.connect(os.path.join(os.environ["LLMOS_HOME"], "run", "control"))
    test.send(json.dumps({"pid": os.getpid(), "standby": bool(promoted)}).encode())
    if promoted:
        test.send(promoted)
    beat = b"\x08\x03\x80"
    while True:
        ready, _, _ = select.select([init, test], [], [], BEAT_S)
        if not ready and beat:
            init.send(beat)
        for end in ready:
            datagram = end.recv(1 << 16)
            if not datagram:
                return
            if datagram == b"mute":
                beat = b""
            elif end is test:
                init.send(datagram)
            else:
                test.send(datagram)


if __name__ == "__main__":
    main()
