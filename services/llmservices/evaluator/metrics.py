"""Metrics: pure functions from what a model said, and what it should have said, to numbers.

The numbers are those of the field's own libraries (scikit-learn, SciPy, sacrebleu); here stands
only which of their functions a name means.  What cannot be computed is refused, never NaN.
"""

import math
from collections.abc import Sequence
from typing import Any, Final

import msgspec
import numpy as np
import sacrebleu
import scipy.stats
from llmproto.errors import invalid
from llmproto.recipes import METRICS
from sklearn import metrics as sklearn

FAMILIES: Final = ("precision", "recall", "f1")
LOGPROB_MIN: Final = math.log(1e-45)
"""Of a label that the model gives no probability at all: the smallest float32's."""


class Labelled(msgspec.Struct, frozen=True):
    """A classifier's word on every row."""

    labels: list[str]
    """All that the model knows, in the order of their ids."""
    wanted: list[int]
    """Of each row, as a place in `labels`."""
    probabilities: list[list[float]]
    """Of each row, one for each label."""


class Valued(msgspec.Struct, frozen=True):
    """A number for every row."""

    wanted: list[float]
    said: list[float]


class Answered(msgspec.Struct, frozen=True):
    """A text for every row."""

    wanted: list[str]
    said: list[str]


class Scored(msgspec.Struct, frozen=True):
    """How surprised the model was: sums over rows."""

    logprobs: list[float]
    """Natural logarithm, over the predicted tokens of each row."""
    tokens: list[int]
    """How many those are."""


Outcome = Labelled | Valued | Answered | Scored


def check_fit(metrics: Sequence[str], task: str) -> None:
    """RemoteError(INVALID) for a metric that is unknown, or that says nothing of this task."""
    for metric in metrics:
        tasks = METRICS.get(metric)
        if tasks is None:
            raise invalid(f"unknown metric {metric!r}: there are {', '.join(METRICS)}")
        if task not in tasks:
            fitting = ", ".join(name for name, fits in METRICS.items() if task in fits)
            raise invalid(
                f"the metric {metric} does not fit a model whose task is {task!r}: "
                f"{fitting or 'none'} do"
            )


def of_labels(metrics: Sequence[str], rows: Labelled) -> dict[str, float]:
    """accuracy, precision, recall, f1, auc, loss.  A label is said where it is the most probable;
    of equals the first."""
    probabilities = np.asarray(rows.probabilities, np.float64)
    wanted = np.asarray(rows.wanted)
    said = probabilities.argmax(axis=1)
    found: dict[str, float] = {}
    for metric in metrics:
        family, _, average = metric.partition("_")
        if metric == "accuracy":
            found[metric] = float(sklearn.accuracy_score(wanted, said))
        elif family in FAMILIES:
            found.update(_family(metric, family, average, rows.labels, wanted, said))
        elif metric == "auc":
            found[metric] = _auc(rows.labels, wanted, probabilities)
        elif metric == "loss":
            right = probabilities[np.arange(len(wanted)), wanted]
            logs = np.log(np.maximum(right, math.exp(LOGPROB_MIN)))
            found[metric] = -math.fsum(logs) / len(logs)
    return found


def _family(
    metric: str,
    family: str,
    average: str,
    labels: Sequence[str],
    wanted: Any,  # arrays of numpy, whose types say little
    said: Any,
) -> dict[str, float]:
    """Without an average: the mean over labels, as the trainer has it."""
    every = list(range(len(labels)))
    columns = sklearn.precision_recall_fscore_support(
        wanted, said, labels=every, average=None, zero_division=0.0
    )
    each = [float(value) for value in columns[FAMILIES.index(family)]]
    if average == "per_class":
        return {f"{metric}/{label}": value for label, value in zip(labels, each)}
    if average == "micro":
        micro = sklearn.precision_recall_fscore_support(
            wanted, said, labels=every, average="micro", zero_division=0.0
        )
        return {metric: float(micro[FAMILIES.index(family)])}
    return {metric: math.fsum(each) / len(each)}


def _auc(labels: Sequence[str], wanted: Any, probabilities: Any) -> float:  # arrays, see above
    """Area under the ROC curve: of the second of two labels, else one against the rest, the mean
    over labels."""
    missing = [label for number, label in enumerate(labels) if number not in wanted]
    if missing:
        raise invalid(f"auc needs rows of every label, and there is none of {missing[0]!r}")
    if len(labels) == 2:
        return float(sklearn.roc_auc_score(wanted == 1, probabilities[:, 1]))
    areas = [
        float(sklearn.roc_auc_score(wanted == number, probabilities[:, number]))
        for number in range(len(labels))
    ]
    return math.fsum(areas) / len(areas)


def of_values(metrics: Sequence[str], rows: Valued) -> dict[str, float]:
    """spearman, loss (mean squared error)."""
    found: dict[str, float] = {}
    for metric in metrics:
        if metric == "loss":
            squares = [(said - wanted) ** 2 for said, wanted in zip(rows.said, rows.wanted)]
            found[metric] = math.fsum(squares) / len(squares)
        elif metric == "spearman":
            if len(set(rows.said)) < 2 or len(set(rows.wanted)) < 2:
                raise invalid(
                    f"spearman is not defined: of {len(rows.said)} rows there are "
                    f"{len(set(rows.wanted))} different values and {len(set(rows.said))} different "
                    "predictions, and it takes 2 of each"
                )
            found[metric] = float(scipy.stats.spearmanr(rows.said, rows.wanted).statistic)
    return found


def of_answers(metrics: Sequence[str], rows: Answered) -> dict[str, float]:
    """exact_match (blanks around it aside), bleu and chrf (0 to 100)."""
    found: dict[str, float] = {}
    for metric in metrics:
        if metric == "exact_match":
            hits = [said.strip() == wanted.strip() for said, wanted in zip(rows.said, rows.wanted)]
            found[metric] = sum(hits) / len(hits)
        elif metric == "bleu":
            found[metric] = float(sacrebleu.corpus_bleu(rows.said, [rows.wanted]).score)
        elif metric == "chrf":
            found[metric] = float(sacrebleu.corpus_chrf(rows.said, [rows.wanted]).score)
    return found


def of_scores(metrics: Sequence[str], rows: Scored) -> dict[str, float]:
    """loss (a token's mean, over all tokens alike) and perplexity."""
    tokens = sum(rows.tokens)
    if not tokens:
        raise invalid("the data have no token that the model could be asked to predict")
    loss = -math.fsum(rows.logprobs) / tokens
    values = {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}
    return {metric: values[metric] for metric in metrics if metric in values}


def of_outcome(metrics: Sequence[str], outcome: Outcome) -> dict[str, float]:
    """Those of the metrics that this outcome can tell."""
    match outcome:
        case Labelled():
            return of_labels(metrics, outcome)
        case Valued():
            return of_values(metrics, outcome)
        case Answered():
            return of_answers(metrics, outcome)
        case Scored():
            return of_scores(metrics, outcome)
