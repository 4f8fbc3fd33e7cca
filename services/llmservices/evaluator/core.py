"""What an evaluation asks of a model, row by row.  Pure: rows and answers in, outcomes out."""

import math
from collections.abc import Mapping, Sequence
from typing import Final, Literal

from llmproto.data import DataRow
from llmproto.errors import RemoteError, invalid
from llmproto.generation import ChatMessage, TextScore

BATCH_ROWS: Final = 16
"""Rows that are asked for at once: enough for an executor's batch."""
REPORTS_MAX: Final = 2000
"""Batches of one evaluation: the kernel keeps every report (JOB_REPORTS_MAX)."""
ANSWERS: Final = ("exact_match", "bleu", "chrf")

Look = Literal["labels", "values", "similarities", "answers", "scores"]


def looks(metrics: Sequence[str], task: str) -> list[Look]:
    """In which ways the data must be gone through for these metrics."""
    match task:
        case "classify":
            return ["labels"]
        case "regress":
            return ["values"]
        case "embed":
            return ["similarities"]
        case _:
            found: list[Look] = []
            if any(metric not in ANSWERS for metric in metrics):
                found.append("scores")
            if any(metric in ANSWERS for metric in metrics):
                found.append("answers")
            return found


def batch_rows(rows: int) -> int:
    """Rows of one batch."""
    return max(BATCH_ROWS, -(-rows // REPORTS_MAX))


def place_of(label: str, labels: Sequence[str]) -> int | None:
    """The id of a label: its name, or its number where the model names its labels LABEL_0, ...,
    which is what folders without names of their own have."""
    if label in labels:
        return labels.index(label)
    unnamed = f"LABEL_{label}"
    return labels.index(unnamed) if unnamed in labels else None


def unknown_label(number: int, label: str, labels: Sequence[str]) -> RemoteError:
    """The refusal of a row whose label the model does not have."""
    return invalid(
        f"row {number}: the label {label!r} is none of the model's: {', '.join(labels)}; correct "
        "it, or set data.unknown_labels = 'skip'"
    )


def question_of(row: DataRow, number: int, *, chat: bool) -> tuple[str | list[ChatMessage], str]:
    """What the model is asked for this row, and what it should say; RemoteError(INVALID) for a row
    without an answer."""
    if row.messages:
        last = max(
            (at for at, turn in enumerate(row.messages) if turn.role == "assistant"), default=0
        )
        if not last:
            raise invalid(f"row {number}: the chat has no answer after its first turn")
        return row.messages[:last], row.messages[last].content
    if row.prompt is None or row.completion is None:
        raise invalid(
            f"row {number} is plain text: {', '.join(ANSWERS)} need prompts and their answers"
        )
    if row.instruction and chat:
        return [ChatMessage(role="user", content=row.prompt)], row.completion
    between = "\n\n" if row.instruction else ""
    return row.prompt + between, row.completion


def sequence_of(ids: Sequence[int], labels: Sequence[int], *, nothing: int) -> list[int]:
    """The tokens to be scored: a row's ids, and the one that its last label adds behind them."""
    return [*ids, labels[-1]] if labels and labels[-1] != nothing else list(ids)


def surprise(
    scores: Sequence[TextScore], labels: Sequence[int], *, nothing: int
) -> tuple[float, int]:
    """Sum of the log-probabilities of the labels, and their number; the score of a token stands at
    its place, one after the place of its label."""
    logprobs = []
    for place, label in enumerate(labels):
        if label == nothing:
            continue
        score = scores[place + 1]
        assert score.token == label, (score.token, label)
        assert score.logprob is not None
        logprobs.append(score.logprob)
    return math.fsum(logprobs), len(logprobs)


def cosine(one: Sequence[float], other: Sequence[float]) -> float:
    """Of two vectors; 0 where one is zero."""
    product = math.fsum(a * b for a, b in zip(one, other))
    lengths = math.sqrt(math.fsum(a * a for a in one) * math.fsum(b * b for b in other))
    return product / lengths if lengths else 0.0


def probabilities_of(scores: Mapping[str, float]) -> tuple[list[str], list[float]]:
    """Labels in the order of their ids, and their probabilities."""
    return list(scores), list(scores.values())
