"""Batches by their number, from the segments of the data service.

Invariant: batch i of a plan is the same whoever asks and when; at most one segment is mapped.
"""

from pathlib import Path
from typing import Protocol, TypeVar

from llmproto.base import Message
from llmproto.data import Prepare, Prepared, Segment, SegmentAsk
from llmproto.errors import ErrorKind, RemoteError

from llmservices.texts.segments import SegmentFile
from llmservices.trainer.batches import Batch, from_segment

MessageT = TypeVar("MessageT", bound=Message)


class Asking(Protocol):
    """Questions, from the step thread."""

    def ask(
        self,
        message: Message,
        answer: type[MessageT],
        *,
        target: str,
        blobs: tuple[bytes, ...] = (),
    ) -> MessageT:
        """Waits for the answer; raises RemoteError where that is Failed."""


class Source:
    """One plan."""

    def __init__(self, bus: Asking, prepare: Prepare) -> None:
        self._bus = bus
        self._prepare = prepare
        self.prepared = bus.ask(prepare, Prepared, target="data")
        self._index: int | None = None
        self._segment: SegmentFile | None = None

    def batch(self, position: int) -> Batch:
        """Number `position`, counted through all epochs."""
        each = self.prepared.segment_batches
        index, within = divmod(position, each)
        if self._segment is None or self._index != index:
            self._segment = SegmentFile(Path(self._ask(index).path))
            self._index = index
        return from_segment(self._segment.batch(within), self._prepare.task)

    def _ask(self, index: int) -> Segment:
        question = SegmentAsk(self.prepared.plan, index, done_below=index)
        try:
            return self._bus.ask(question, Segment, target="data")
        except RemoteError as error:
            if error.kind is not ErrorKind.STALE:
                raise
        # The service has been started anew, or has forgotten.
        again = self._bus.ask(self._prepare, Prepared, target="data")
        if again.plan != self.prepared.plan:
            raise RemoteError(
                ErrorKind.INVALID,
                f"the data has changed during the run: its plan was {self.prepared.plan.hex()}, "
                f"it is {again.plan.hex()}",
            )
        return self._bus.ask(question, Segment, target="data")
