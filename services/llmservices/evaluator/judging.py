"""Going through the data with a model: everything that waits for others in an evaluation.

Each look gives its batches in the order of the rows, so that a repeated one gives the same.
"""

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple, TypeVar

import msgspec
from blake3 import blake3
from libllm.client import AsyncClient
from libllm.options import Options
from libllm.port import Port
from libllm.vectors import Classification
from llmproto.data import DataRow, Prepare, Prepared, Rows, RowsAsk, Segment, SegmentAsk
from llmproto.errors import ErrorKind, RemoteError, invalid
from llmproto.models import ModelEntry
from llmproto.recipes import DataRecipe, EvaluationRecipe

from llmservices.evaluator import core
from llmservices.evaluator.metrics import Answered, Labelled, Outcome, Scored, Valued
from llmservices.texts.segments import NOTHING, SegmentFile

BACKGROUND: Final = 2
"""The class `batch`: whoever waits for an answer goes first."""

T = TypeVar("T")


class Done(NamedTuple):
    """One batch is judged."""

    rows: int
    tokens: int
    loss: float
    """Of its tokens, where that is what is measured."""


Tell = Callable[[Done], None]


class Judge:
    """One evaluation's way through its data."""

    def __init__(
        self, port: Port, llm: AsyncClient, recipe: EvaluationRecipe, model: ModelEntry
    ) -> None:
        self._port = port
        self._llm = llm
        self._recipe = recipe
        self._model = model
        self._options: Options = {
            "model": model.name,
            "service_class": BACKGROUND,
            "wait": True,
        }

    async def rows(self) -> Rows:
        """The data as text."""
        task = "regress" if self._model.task == "embed" else self._model.task
        data = msgspec.structs.replace(self._recipe.data, augment=None)
        ask = RowsAsk(data=data, task=task)
        found = await self._port.call(ask, Rows, target="data")
        if not found.rows:
            raise invalid(f"the data have no rows: {_dropped(found.dropped)}")
        return found

    async def prepared(self) -> Prepared:
        """The data as tokens, in their own order, each document in a row of its own."""
        data = msgspec.structs.replace(
            self._recipe.data, packing="none", sampling="epochs", augment=None
        )
        ask = Prepare(
            data=data,
            part="train",
            task="generate",
            tokenizer=self._model.path,
            context_tokens=self._context_tokens(data),
            batch=core.BATCH_ROWS,
            seed=0,
            shuffle=False,
        )
        found = await self._port.call(ask, Prepared, target="data")
        if found.batches > core.REPORTS_MAX:
            larger = msgspec.structs.replace(ask, batch=core.batch_rows(found.rows))
            found = await self._port.call(larger, Prepared, target="data")
        return found

    def _context_tokens(self, data: DataRecipe) -> int:
        """Rows that are cut are followed by one more token, which must fit as well."""
        cut = data.too_long in ("split", "truncate")
        return max(1, self._model.context_tokens - cut)

    # --- looks ---------------------------------------------------------------------------------

    async def labels(self, rows: Rows, tell: Tell) -> Outcome:
        """Ask a classifier about every row."""
        labels: list[str] = []
        wanted: list[int] = []
        said: list[list[float]] = []
        number = 0
        for batch in batches(rows):
            answers = await self._classified(batch)
            for row, answer in zip(batch, answers):
                number += 1
                labels, probabilities = core.probabilities_of(answer.scores)
                place = core.place_of(row.label or "", labels)
                if place is None:
                    if self._recipe.data.unknown_labels == "skip":
                        continue
                    raise core.unknown_label(number, row.label or "", labels)
                wanted.append(place)
                said.append(probabilities)
            tell(Done(len(batch), sum(answer.tokens for answer in answers), 0.0))
        if not wanted:
            raise invalid(f"no row has one of the model's labels: {', '.join(labels)}")
        return Labelled(labels, wanted, said)

    async def values(self, rows: Rows, tell: Tell) -> Outcome:
        """Ask a regression about every row."""
        wanted: list[float] = []
        said: list[float] = []
        for batch in batches(rows):
            answers = await self._classified(batch)
            wanted += [row.value or 0.0 for row in batch]
            said += [answer.score for answer in answers]
            tell(Done(len(batch), sum(answer.tokens for answer in answers), 0.0))
        return Valued(wanted, said)

    async def similarities(self, rows: Rows, tell: Tell) -> Outcome:
        """How alike an encoder finds the two texts of every row."""
        wanted: list[float] = []
        said: list[float] = []
        truncate = self._recipe.data.too_long == "truncate"
        for batch in batches(rows):
            if any(row.pair is None for row in batch):
                raise invalid("an embedding model is judged by pairs of texts with a value each")
            texts = [text for row in batch for text in (row.text, row.pair or "")]
            found = await self._llm.embed(
                texts,
                model=self._model.name,
                truncate=truncate,
                service_class=BACKGROUND,
                wait=True,
            )
            vectors = list(found)
            said += [core.cosine(*pair) for pair in zip(vectors[::2], vectors[1::2])]
            wanted += [row.value or 0.0 for row in batch]
            tell(Done(len(batch), found.tokens, 0.0))
        return Valued(wanted, said)

    async def answers(self, rows: Rows, tell: Tell) -> Outcome:
        """Let the model answer every row, always the likeliest token."""
        wanted: list[str] = []
        said: list[str] = []
        number = itertools.count(1)
        for batch in batches(rows):
            questions = [
                core.question_of(row, next(number), chat=self._model.chat) for row in batch
            ]
            asked = [asyncio.ensure_future(self._answer(question)) for question, _ in questions]
            found = await _all(asked)
            said += [text for text, _ in found]
            wanted += [answer for _, answer in questions]
            tell(Done(len(batch), sum(tokens for _, tokens in found), 0.0))
        return Answered(wanted, said)

    async def scores(self, prepared: Prepared, tell: Tell) -> Outcome:
        """How probable the model finds the data."""
        logprobs: list[float] = []
        tokens: list[int] = []
        async for rows in self._tokens(prepared):
            asked = [asyncio.ensure_future(self._score(ids, labels)) for ids, labels in rows]
            found = await _all(asked)
            logprobs += [logprob for logprob, _ in found]
            tokens += [count for _, count in found]
            count = sum(count for _, count in found)
            surprise = -sum(logprob for logprob, _ in found)
            tell(Done(len(rows), count, surprise / count if count else 0.0))
        return Scored(logprobs, tokens)

    # --- questions -----------------------------------------------------------------------------

    async def _classified(self, rows: Sequence[DataRow]) -> list[Classification]:
        pairs = [row.pair for row in rows if row.pair is not None]
        if pairs and len(pairs) != len(rows):
            raise invalid(f"{len(pairs)} of {len(rows)} rows are pairs of texts: all must be")
        return await self._llm.classify(
            [row.text for row in rows],
            pairs=pairs or None,
            model=self._model.name,
            truncate=self._recipe.data.too_long == "truncate",
            service_class=BACKGROUND,
            wait=True,
        )

    async def _answer(self, question: object) -> tuple[str, int]:
        options: Options = {
            **self._options,
            "temperature": 0.0,
            "max_tokens": self._recipe.output_tokens_max,
        }
        if isinstance(question, str):
            found = await self._llm.generate(question, **options)
        else:
            assert isinstance(question, list)
            found = await self._llm.chat(question, **options)
        return found.text, found.usage.output_tokens

    async def _score(self, ids: list[int], labels: list[int]) -> tuple[float, int]:
        if all(label == NOTHING for label in labels):
            return 0.0, 0
        options: Options = {
            **self._options,
            "max_tokens": 0,
            "logprobs": 0,
            "prompt_logprobs": True,
        }
        sequence = core.sequence_of(ids, labels, nothing=NOTHING)
        found = await self._llm.generate(sequence, **options)
        return core.surprise(found.choices[0].prompt_scores or [], labels, nothing=NOTHING)

    async def _tokens(self, prepared: Prepared) -> AsyncIterator[list[tuple[list[int], list[int]]]]:
        """The batches of one epoch."""
        made, at = prepared, 0
        while at < prepared.batches:
            index = at // prepared.segment_batches
            try:
                segment = await self._port.call(
                    SegmentAsk(made.plan, index, done_below=index), Segment, target="data"
                )
            except RemoteError as error:
                if error.kind is not ErrorKind.STALE:
                    raise
                made = await self.prepared()  # it was started again
                continue
            file = SegmentFile(segment.path)
            for inside in range(at - index * prepared.segment_batches, len(file)):
                if at == prepared.batches:
                    return
                batch = file.batch(inside)
                yield [
                    (batch.ids.row(row).tolist(), batch.labels.row(row).tolist())
                    for row in range(batch.rows)
                ]
                at += 1


def batches(rows: Rows) -> Iterator[list[DataRow]]:
    """Those of the file, a line at a time; RemoteError(INTERNAL) where it is not what was made."""
    content = Path(rows.path).read_bytes()
    if blake3(content).digest() != rows.digest:
        raise RemoteError(ErrorKind.INTERNAL, f"{rows.path} is not what the data service made")
    decoder = msgspec.json.Decoder(DataRow)
    lines = content.splitlines()
    size = core.batch_rows(len(lines))
    for first in range(0, len(lines), size):
        yield [decoder.decode(line) for line in lines[first : first + size]]


async def _all(asked: "Sequence[asyncio.Future[T]]") -> list[T]:
    """Every result, in order; where one fails the others are given up."""
    try:
        return [await future for future in asked]
    finally:
        for future in asked:
            future.cancel()


def _dropped(dropped: dict[str, int]) -> str:
    reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(dropped.items()))
    return f"{reasons} were left out" if reasons else "the files are empty"
