"""A kernel waits for its promotion, and misses nothing that was said behind it."""

import os
import threading

from llmkernel import initlink
from llmkernel.initlink import Link
from llmkernel.standby import await_promotion
from llmproto.init import Exit, Exited, Promoted, Stop

PROMOTED = Promoted(b"b" * 16, [], [], 1)
EXITED = Exited(Exit("executor-1", 1, 7, None, 9))


def test_what_follows_the_promotion_is_handed_on() -> None:
    inits, end = initlink.pair()
    kernel = Link(end)
    inits.send(PROMOTED)
    inits.send(EXITED)
    inits.send(Stop())
    assert await_promotion(kernel, None) == (PROMOTED, [EXITED, Stop()])
    inits.close()
    kernel.close()


def test_it_waits() -> None:
    inits, end = initlink.pair()
    kernel = Link(end)
    reading, writing = os.pipe()
    found: list[Promoted] = []
    waiting = threading.Thread(target=lambda: found.append(await_promotion(kernel, reading)[0]))
    waiting.start()
    inits.send(EXITED)  # what was said to nobody is not its business
    inits.send(PROMOTED)
    waiting.join()
    assert found == [PROMOTED]
    for end_ in (reading, writing):
        os.close(end_)
    inits.close()
    kernel.close()


def ended_by(act: str) -> int:
    """Exit code of a process that waits while its init does this."""
    inits, end = initlink.pair()
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        inits.close()
        os.close(writing)
        await_promotion(Link(end), reading)
        os._exit(9)
    os.close(reading)
    end.close()
    if act == "close the link":
        inits.close()
    else:
        os.close(writing)
    _, status = os.waitpid(pid, 0)
    if act == "close the link":
        os.close(writing)
    else:
        inits.close()
    return os.waitstatus_to_exitcode(status)


def test_it_ends_with_init() -> None:
    assert ended_by("close the link") == 0
    assert ended_by("close the lifeline") == 0
