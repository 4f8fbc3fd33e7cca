"""A model on data that it does not learn from: its loss, and what a classifier gets right."""

import math
from collections.abc import Callable, Sequence

import torch

from llmservices.trainer.core import Training
from llmservices.trainer.source import Source


def validate(
    training: Training, source: Source, wanted: Sequence[str], between: Callable[[], None]
) -> dict[str, float]:
    """`loss`, and the wanted metrics; a classifier's accuracy always."""
    total, targets = 0.0, 0
    guessed: list[float] = []
    right: list[float] = []
    learner = training.learner
    with training.judging():
        for position in range(source.prepared.batches):
            for micro in training.micro_batches(source.batch(position)):
                if learner.task == "generate":
                    total += learner.loss(micro).item()
                else:
                    judged = learner.judge(micro.documents)
                    total += learner.judged_loss(judged, micro.targets).item()
                    best = judged.argmax(-1) if learner.task == "classify" else judged.squeeze(-1)
                    guessed += best.float().tolist()
                    right += micro.targets.float().tolist()
                targets += micro.count
                between()
    loss = total / max(1, targets)
    return {"loss": loss} | _others(learner.task, loss, right, guessed, wanted)


def _others(
    task: str, loss: float, right: list[float], guessed: list[float], wanted: Sequence[str]
) -> dict[str, float]:
    if task == "generate":
        return {"perplexity": math.exp(min(loss, 700.0))} if "perplexity" in wanted else {}
    if task == "regress":
        return {"spearman": _spearman(right, guessed)} if "spearman" in wanted else {}
    same = sum(a == b for a, b in zip(right, guessed))
    found = {"accuracy": same / max(1, len(right))}
    macro = _macro(right, guessed)
    return found | {name: value for name, value in macro.items() if name in wanted}


def _macro(right: list[float], guessed: list[float]) -> dict[str, float]:
    """Precision, recall and F1, mean over the classes that occur; 0 where undefined."""
    rows: list[tuple[float, float, float]] = []
    for label in sorted({*right, *guessed}):
        hits = sum(a == b == label for a, b in zip(right, guessed))
        said, there = guessed.count(label), right.count(label)
        rows.append((hits / max(1, said), hits / max(1, there), 2 * hits / max(1, said + there)))
    means = [sum(column) / max(1, len(rows)) for column in zip(*rows)]
    return dict(zip(("precision", "recall", "f1"), means))


def _spearman(right: list[float], guessed: list[float]) -> float:
    """Correlation of ranks, ties sharing theirs."""

    def ranks(values: list[float]) -> torch.Tensor:
        column = torch.tensor(values, dtype=torch.float64)
        below = (column[None, :] < column[:, None]).sum(1)
        equal = (column[None, :] == column[:, None]).sum(1)
        return below + (equal - 1) / 2

    both = torch.stack([ranks(right), ranks(guessed)])
    found = float(torch.corrcoef(both)[0, 1])
    return found if math.isfinite(found) else 0.0
