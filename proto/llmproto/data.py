"""Conversation 0x0c: the data service: files in, batches out.

A *plan* is a dataset (its files' content), a pipeline (reading, cleaning, tokenising, packing) and
an order (seed).  Batch i of a plan is a pure function of the plan and i.  Batches come as segments:
Arrow files, named by what they hold, that the trainer maps into its memory.
"""

from typing import Annotated

import msgspec
from msgspec import Meta

from llmproto import limits
from llmproto.base import Detail, Int53, Message, Path
from llmproto.generation import ChatMessage
from llmproto.recipes import AugmentOptions, CleanOptions, DataRecipe, TokenizerRecipe

PlanDigest = Annotated[bytes, Meta(min_length=32, max_length=32)]


class Prepare(Message, frozen=True):
    """Trainer or evaluator -> `data`: read, clean and tokenise, or find that done before.  Answered
    by Prepared, or Failed(INVALID) naming file and line.  Repeating it is cheap."""

    data: DataRecipe
    part: Annotated[str, Meta(pattern="^(train|validation)$")]
    task: Annotated[str, Meta(pattern="^(generate|classify|regress)$")]
    tokenizer: Path
    """Folder that holds tokenizer.json and the chat template."""
    context_tokens: Annotated[int, Meta(ge=1)]
    """Longest sequence."""
    batch: Annotated[int, Meta(ge=1, le=1 << 20)]
    """Sequences (or packed rows) in one batch, over all ranks."""
    seed: Int53
    shuffle: bool = True
    labels: list[str] = []
    """Of a classifier, in the order of their ids; empty: found in the data (and given back)."""


class Prepared(Message, frozen=True):
    """`data` -> requester, answers Prepare."""

    plan: PlanDigest
    """Of dataset, pipeline and order."""
    dataset: Annotated[str, Meta(max_length=128)]
    """Digest of dataset and pipeline, hexadecimal: for the lineage."""
    rows: Int53
    """Sequences in one epoch, after packing."""
    batches: Int53
    """In one epoch; the last may be smaller."""
    tokens: Int53
    """In one epoch."""
    segment_batches: Int53
    """Batches in one segment."""
    dropped: dict[str, Int53] = {}
    """Rows that were left out, by reason."""
    labels: list[str] = []
    """Of a classifier, in the order of their ids."""
    changed: dict[str, Int53] = {}
    """Rows that were changed (truncated, split, repaired ...), and `unknown_tokens`, by what was
    done."""


class SegmentAsk(Message, frozen=True):
    """Rank -> `data`: the batches index x segment_batches .. of the plan (counting through all
    epochs).  Answered by Segment, or Failed(STALE: say Prepare again).  The next one is made ahead:
    that is the credit."""

    plan: PlanDigest
    index: Int53
    done_below: Int53 = 0
    """Segments below this one are not needed any more by anybody of this job."""


class Segment(Message, frozen=True):
    """`data` -> rank, answers SegmentAsk: an Arrow IPC file.  One record batch is one training
    batch, one row one sequence (`llmservices.texts.segments` reads it).  Columns:

    - `ids` (list<int32>): the tokens, at most `context_tokens`.
    - `labels` (list<int32>).  Task generate: as long as `ids`; labels[j] is the token that the
      model is to predict from ids[0..j], which is the one that follows, or -100 where nothing is
      learned: already shifted, so a loss takes logits and labels as they stand.  Task classify:
      one id.  Task regress: empty.
    - `lengths` (list<int32>): the documents of the row, in order; attention does not cross them.
      They add up to the row.
    - `types` (list<int32>): token types, only where the rows are pairs of texts and the tokenizer
      tells them apart.
    - `value` (float32): only with task regress.

    A file is kept until a few segments later; who finds it gone asks
    again, and gets the same bytes.
    """

    path: Path
    digest: PlanDigest
    """BLAKE3 of the file."""
    bytes: Int53


class DataRow(msgspec.Struct, frozen=True, omit_defaults=True):
    """One row as text, cleaned: what an evaluation judges by."""

    text: str = ""
    """Plain text, or the first text of a labelled row."""
    pair: str | None = None
    label: str | None = None
    value: float | None = None
    """Regression."""
    prompt: str | None = None
    completion: str | None = None
    """What the prompt should be answered with."""
    instruction: bool = False
    """The prompt is what a user would say."""
    messages: list[ChatMessage] = []
    """A chat; the last turn of the assistant is the answer."""


class RowsAsk(Message, frozen=True):
    """Evaluator -> `data`: the rows as text, in their order, read and cleaned.  Answered by Rows,
    or Failed(INVALID) naming file and line.  Repeating it is cheap."""

    data: DataRecipe
    part: Annotated[str, Meta(pattern="^(train|validation)$")] = "train"
    task: Annotated[str, Meta(pattern="^(generate|classify|regress)$")] = "generate"


class Rows(Message, frozen=True):
    """`data` -> requester, answers RowsAsk: a file of JSON lines, each a DataRow."""

    path: Path
    digest: PlanDigest
    """BLAKE3 of the file."""
    rows: Int53
    format: str
    labels: list[str] = []
    """Of a classifier: those of the recipe, else those in the rows, sorted."""
    dropped: dict[str, Int53] = {}
    """Rows that were left out, by reason."""


class TokenizerMake(Message, frozen=True):
    """Trainer or operator -> `data`: make a tokenizer of the training data, or of a folder.
    Answered by TokenizerMade, or Failed.  The same question gives the same files."""

    data: DataRecipe
    tokenizer: TokenizerRecipe
    output: Path
    """Folder that gets tokenizer.json, tokenizer_config.json and, if there is one,
    chat_template.jinja; each is replaced at once, whole."""


class TokenizerMade(Message, frozen=True):
    """`data` -> requester, answers TokenizerMake."""

    path: Path
    """The folder."""
    vocabulary: Int53
    """Tokens: ids are below it."""
    bos: Int53 | None = None
    end: Int53 | None = None
    """What stands after every document."""


class DataClean(Message, frozen=True):
    """Operator -> `data`: write a cleaned copy.  Answered by DataReport when it is whole, or
    Failed.  An output that exists is replaced only with `overwrite`."""

    inputs: Annotated[list[Path], Meta(min_length=1, max_length=1024)]
    output: Path
    clean: CleanOptions
    data: DataRecipe | None = None
    """How to read the inputs, where that cannot be seen from them."""
    overwrite: bool = False
    rows: bool = False
    """Write OUTPUT.dropped.jsonl too: each dropped row with its reason."""


class DataAugment(Message, frozen=True):
    """Operator -> `data`: write an augmented copy.  Answered by DataReport, or Failed."""

    inputs: Annotated[list[Path], Meta(min_length=1, max_length=1024)]
    output: Path
    augment: AugmentOptions
    data: DataRecipe | None = None
    overwrite: bool = False


class DataInspect(Message, frozen=True):
    """Operator -> `data`: what is in these files.  Answered by DataReport."""

    inputs: Annotated[list[Path], Meta(min_length=1, max_length=1024)]
    data: DataRecipe | None = None
    tokenizer: Path | None = None
    """Count tokens with the tokenizer of this folder."""


class DataColumn(msgspec.Struct, frozen=True):
    """A column of the data as it was read."""

    name: str
    type: str
    missing: Int53 = 0
    values: dict[str, Int53] = {}
    """The most frequent ones, of a column with few."""
    characters: list[Int53] = []
    """Shortest, median, 95th percentile, longest, of text."""


class DataReport(Message, frozen=True):
    """`data` -> requester."""

    format: str
    rows_in: Int53
    rows_out: Int53
    dropped: dict[str, Int53] = {}
    """Rows left out, by reason."""
    changed: dict[str, Int53] = {}
    """Rows changed, by what was done."""
    bad: Annotated[list[Detail], Meta(max_length=limits.DATA_PROBLEMS_MAX)] = []
    """The first malformed rows: file, line and what is wrong."""
    columns: list[DataColumn] = []
    examples: list[str] = []
    tokens: Int53 | None = None
