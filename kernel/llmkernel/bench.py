"""How long the core takes: `python -m llmkernel.bench`.

Measures the pure core alone; where it says so, with its messages and records encoded as the shell
does.  No socket, no disk.  Medians of several rounds, on one core.
"""

import gc
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Final

from llmproto import limits, wire
from llmproto.base import Header, Message
from llmproto.connection import Beat
from llmproto.execution import Stepped
from llmproto.generation import StreamAcked, Text
from llmproto.kinds import KIND_OF
from llmproto.operation import StatusAsk
from llmproto.threads import SinkAcked

from llmkernel import facts
from llmkernel.events import Arrived, Effect, Event, Forward, Record, Send, Ticked
from llmkernel.testkit.rig import Peer, Rig

THREADS: Final = 256
ROUNDS: Final = 300


def main() -> None:
    """Print one line a figure."""
    gc.disable()
    rig = Rig()
    tokenizer = rig.tokenizer()
    client = rig.client()
    threads = [
        rig.spawn(client, tokenizer, number.to_bytes(16), output_tokens_max=2045)
        for number in range(THREADS)
    ]
    executor = rig.executor(residents_max=THREADS, blocks=1 << 20)
    for encoded in (False, True):
        what = "a commit of 256 tokens" + (", effects encoded" if encoded else "")
        figure(what, _commits(rig, executor, tokenizer, threads, encoded=encoded))
    text = Text([bytes(17)], [0], ["x"], [1], [None])
    acked = StreamAcked([bytes(17)], [1], [1], [False])
    events: list[tuple[str, Event]] = [
        ("an event: Beat", arrival(client, Beat())),
        ("an event: Text passed on", arrival(tokenizer, text, to=client.session)),
        ("an event: StreamAcked passed on", arrival(client, acked, target="tokenizer")),
        ("an event: StatusAsk, 256 threads", arrival(client, StatusAsk())),
        ("a tick, 256 threads", Ticked()),
    ]
    for name, event in events:
        figure(name, _timed(partial(rig.kernel.handle, rig.now_ns, event)))


def figure(name: str, ns: float) -> None:
    """One line."""
    sys.stdout.write(f"{name:<40}{ns / 1000:9.1f} us\n")


def arrival(
    peer: Peer, message: Message, *, target: str = "kernel", to: bytes | None = None
) -> Arrived:
    """A message as the socket gives it."""
    kind = KIND_OF[type(message)]
    header = Header(limits.PROTOCOL_VERSION, kind, bytes(16), target=target, peer=to)
    return Arrived(peer.peer, tuple(wire.encode(header, message)))


def _commits(
    rig: Rig, executor: Peer, tokenizer: Peer, threads: list[bytes], *, encoded: bool
) -> float:
    """Steps of all threads, each acknowledged, timed without what is not the core's."""
    times = []
    residencies = [rig.thread(thread).residency or 0 for thread in threads]
    for _ in range(ROUNDS):
        position = len(rig.thread(threads[0]).tokens)
        count = len(threads)
        step = Stepped(threads, residencies, [position] * count, [7] * count, [0] * count, 9)
        event = arrival(executor, step)
        before = time.perf_counter_ns()
        effects = rig.kernel.handle(rig.now_ns, event)
        if encoded:
            _encode(effects)
        times.append(time.perf_counter_ns() - before)
        acks = SinkAcked(threads, [position] * count, [False] * count)
        rig.kernel.handle(rig.now_ns, arrival(tokenizer, acks))
    return statistics.median(times)


def _encode(effects: list[Effect]) -> None:
    for effect in effects:
        if isinstance(effect, Record):
            facts.encode(effect.fact)
        elif isinstance(effect, Send):
            wire.encode_header(effect.header)
            wire.encode_body(effect.message)
        elif isinstance(effect, Forward):
            wire.encode_header(effect.header)


def _timed(call: Callable[[], object]) -> float:
    times = []
    for _ in range(ROUNDS):
        before = time.perf_counter_ns()
        call()
        times.append(time.perf_counter_ns() - before)
    return statistics.median(times)


if __name__ == "__main__":
    main()
