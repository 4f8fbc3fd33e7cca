"""Steps of fixed shape, recorded once and started again with one call.

Source: CUDA graphs, CUDA C++ Programming Guide, section "CUDA Graphs".
"""

import gc
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch

Step = Callable[[torch.Tensor], torch.Tensor]
"""From the packed input to the output; both keep their place in memory."""


def on(device: torch.device) -> AbstractContextManager[object]:
    """Inside, streams, events and our kernels are this device's; else they are the first one's, in
    each new thread."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


class Pace:
    """Keeps the host no more than one step ahead of the device.

    Nobody waits for a step that gives no token.  Without this all chunks of a long prompt would be
    started at once, as if they cost nothing, and the one step that is waited for after them would
    look as if it hung.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._ends: deque[torch.cuda.Event] = deque()

    def wait(self) -> None:
        """Before a step is started.  After a decode whose tokens came there is nothing to wait
        for."""
        while len(self._ends) > 1:
            self._ends.popleft().synchronize()

    def started(self) -> None:
        """After it was."""
        if self._device.type == "cuda":
            end = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]  # torch's own
            end.record()
            self._ends.append(end)


def buckets(rows_max: int) -> list[int]:
    """Row counts that steps are padded to, ascending: at most a seventh of the rows is wasted
    beyond eight."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, rows_max, 32)]
    return [*(size for size in sizes if size < rows_max), rows_max]


class Graph:
    """One step over one input buffer: a recorded graph on a GPU, the step itself elsewhere.

    Invariant: the values of the output are those of the newest `run`, until the next one of any
    graph that shares the pool.
    """

    def __init__(self, step: Step, packed: torch.Tensor, pool: "Pool") -> None:
        self._step = step
        self._packed = packed
        self._graph: torch.cuda.CUDAGraph | None = None
        if packed.is_cuda:
            self._graph, self._out = pool.record(step, packed)

    def run(self, values: torch.Tensor) -> torch.Tensor:
        """Copy the input and start."""
        self._packed.copy_(values, non_blocking=True)
        if self._graph is None:
            return self._step(self._packed)
        self._graph.replay()
        return self._out


class Pool:
    """Memory that all graphs of one runner share: no two of them ever run at once."""

    def __init__(self) -> None:
        self._first: torch.cuda.CUDAGraph | None = None
        # One for all: the matrix products' library keeps memory for every stream that it ever saw.
        self._beside: torch.cuda.Stream | None = None

    def record(self, step: Step, packed: torch.Tensor) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
        """Run twice on a stream beside, for what kernels do when they are first used, and
        record."""
        if self._beside is None:
            # A graph that is forgotten must not be found, and destroyed, while one is recorded.
            gc.collect()
            self._beside = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch's own
        beside = self._beside
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            for _ in range(2):
                step(packed)
        torch.cuda.current_stream().wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        shared = None if self._first is None else self._first.pool()
        with torch.cuda.graph(graph, pool=shared):
            out = step(packed)
        self._first = self._first or graph
        return graph, out
