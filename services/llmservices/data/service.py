"""The data service at work: what it is asked, done beside the event loop, each thing once.

Whatever it holds can be made again from the question, so it may die at any moment.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, TypeVar

import msgspec
from libllm.config import DataConfig, Home
from libllm.events import Holding
from libllm.port import Port
from libllm.service import Handlers, Request, Service
from llmproto import limits
from llmproto.base import Message
from llmproto.data import (
    DataAugment,
    DataClean,
    DataInspect,
    DataReport,
    Prepare,
    Prepared,
    Rows,
    RowsAsk,
    Segment,
    SegmentAsk,
    TokenizerMade,
    TokenizerMake,
)
from llmproto.errors import ErrorKind, RemoteError

from llmservices.data.cache import Cache
from llmservices.data.making import make_tokenizer
from llmservices.data.operations import augment_files, clean_files, inspect_files
from llmservices.data.plans import Maker, Planned
from llmservices.data.segments import SegmentMade, make_segment
from llmservices.data.textrows import make_rows

PLANS_MAX: Final = 64
"""Plans that are known: two for each running job, and room.  The least recently asked is
forgotten; who asks for it prepares again."""
WORKS_MAX: Final = 64
"""Questions that are worked on or wait for a thread."""
WORKERS: Final = 2
"""Threads for long work: its heavy parts use all cores anyway."""
SEGMENTS_KEPT: Final = 4
"""Of one plan, behind the one asked for: what ranks that lag behind may still open."""

T = TypeVar("T")
MessageT = TypeVar("MessageT", bound=Message)
Key = tuple[Hashable, ...]


class DataService(Service):
    """Answers what is asked of data.

    Invariant: two askers of the same thing share one piece of work.
    """

    def __init__(self, port: Port, home: Home, config: DataConfig) -> None:
        self._port = port
        self._cache = Cache(home.cache / "data", bytes_max=config.cache_bytes_max)
        self._texts = home.cache / "data" / "texts"
        self._maker = Maker(self._cache, self._in_use, self._advance)
        self._plans: OrderedDict[bytes, Planned] = OrderedDict()
        self._works: dict[Key, asyncio.Future[Any]] = {}  # Any: each work has its own result
        self._segments: dict[tuple[bytes, int], SegmentMade] = {}
        self._long = ThreadPoolExecutor(WORKERS, "long")
        self._short = ThreadPoolExecutor(WORKERS, "segments")
        self._ahead: set[asyncio.Future[SegmentMade]] = set()
        self._progress = 0

    def handlers(self) -> Handlers:
        """What it takes."""
        return {
            Prepare: self.prepare,
            SegmentAsk: self.segment,
            RowsAsk: self.texts,
            TokenizerMake: self.make_tokenizer,
            DataClean: self.clean,
            DataAugment: self.augment,
            DataInspect: self.inspect,
        }

    def holding(self) -> Holding:
        """Progress: rows and pieces of work done."""
        return Holding(progress=self._progress)

    async def start(self) -> None:
        """Make the cache's folders, remove what a dead process left."""
        await self._port.loop.run_in_executor(self._short, self._cache.open)

    async def settle(self) -> None:
        """Until no work is under way."""
        while waiting := [*self._works.values(), *self._ahead]:
            await asyncio.wait(waiting)
            await asyncio.sleep(0)  # what they leave behind is cleared away

    async def prepare(self, message: Prepare, request: Request) -> Prepared:
        """Rows tokenised, in an order."""
        planned = await self._once(message, self._maker.prepare)
        digest = planned.prepared.plan
        self._plans[digest] = planned
        self._plans.move_to_end(digest)
        while len(self._plans) > PLANS_MAX:
            self._forget(next(iter(self._plans)))
        return planned.prepared

    async def segment(self, message: SegmentAsk, request: Request) -> Segment:
        """Batches in a file; the next one is begun."""
        planned = self._plans.get(message.plan)
        if planned is None:
            raise RemoteError(
                ErrorKind.STALE, "this plan is not known (any more): prepare it again"
            )
        self._plans.move_to_end(message.plan)
        made = await self._segment(message.plan, planned, message.index)
        self._drop(message.plan, max(message.done_below, message.index - SEGMENTS_KEPT))
        ahead = asyncio.ensure_future(self._segment(message.plan, planned, message.index + 1))
        self._ahead.add(ahead)
        ahead.add_done_callback(_look_away)
        ahead.add_done_callback(self._ahead.discard)
        return Segment(str(made.path), made.digest, made.bytes)

    async def texts(self, message: RowsAsk, request: Request) -> Rows:
        """Rows as text, in a file."""

        def make(ask: RowsAsk) -> Rows:
            return make_rows(ask, folder=self._texts, cache=self._cache, progress=self._advance)

        return await self._once(message, make)

    async def make_tokenizer(self, message: TokenizerMake, request: Request) -> TokenizerMade:
        """A tokenizer of the data."""
        return await self._once(message, lambda ask: make_tokenizer(ask, cache=self._cache))

    async def clean(self, message: DataClean, request: Request) -> DataReport:
        """A cleaned copy."""
        return await self._once(message, lambda ask: clean_files(ask, self._advance))

    async def augment(self, message: DataAugment, request: Request) -> DataReport:
        """An augmented copy."""
        return await self._once(message, lambda ask: augment_files(ask, self._advance))

    async def inspect(self, message: DataInspect, request: Request) -> DataReport:
        """What is in files."""
        return await self._once(message, lambda ask: inspect_files(ask, self._advance))

    async def _once(self, message: MessageT, do: Callable[[MessageT], T]) -> T:
        """Long work that equal questions share."""
        key = ("long", type(message).__name__, msgspec.msgpack.encode(message))
        return await self._share(key, self._long, lambda: do(message))

    async def _segment(self, plan: bytes, planned: Planned, index: int) -> SegmentMade:
        found = self._segments.get((plan, index))
        if found is not None:
            return found
        made = await self._share(
            ("segment", plan, index),
            self._short,
            lambda: make_segment(self._cache, planned.plan, plan, index),
        )
        self._segments[plan, index] = made
        return made

    def _drop(self, plan: bytes, below: int) -> None:
        for key in [key for key in self._segments if key[0] == plan and key[1] < below]:
            del self._segments[key]
        self._cache.drop_segments(plan, below=below)

    def _forget(self, plan: bytes) -> None:
        del self._plans[plan]
        self._drop(plan, 1 << 53)

    def _in_use(self) -> set[str]:
        return {planned.prepared.dataset for planned in list(self._plans.values())}

    def _advance(self, rows: int) -> None:
        self._progress += rows

    async def _share(self, key: Key, pool: ThreadPoolExecutor, do: Callable[[], T]) -> T:
        """The result of the work that this key stands for, begun if nobody has."""
        work = self._works.get(key)
        if work is None:
            if len(self._works) >= WORKS_MAX:
                raise RemoteError(
                    ErrorKind.EXHAUSTED,
                    f"{len(self._works)} pieces of work wait here, at most {WORKS_MAX} may",
                    retry_after_ms=limits.REQUEST_RETRY_MS,
                )
            if pool is self._long:
                self._port.working("preparing", budget_ms=limits.WORKING_MS_MAX)
            work = self._port.loop.run_in_executor(pool, do)
            self._works[key] = work
            work.add_done_callback(lambda _: self._done(key, pool))
        result: T = await asyncio.shield(work)
        return result

    def _done(self, key: Key, pool: ThreadPoolExecutor) -> None:
        work = self._works.pop(key)
        self._progress += 1
        _look_away(work)
        if pool is self._long and not any(key[0] == "long" for key in self._works):
            self._port.working("preparing", budget_ms=0)


def _look_away(work: "asyncio.Future[Any]") -> None:  # Any: see above
    """A failure that nobody waits for comes again when somebody asks."""
    if not work.cancelled():
        work.exception()
