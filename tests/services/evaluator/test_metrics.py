"""Metrics against values worked out by hand, and what cannot be computed."""

import math

import pytest
from llmproto.errors import RemoteError
from llmproto.recipes import METRICS
from llmservices.evaluator.metrics import (
    Answered,
    Labelled,
    Scored,
    Valued,
    check_fit,
    of_answers,
    of_labels,
    of_outcome,
    of_scores,
    of_values,
)

CLASSIFIER = [name for name, tasks in METRICS.items() if "classify" in tasks]
# Of the label "yes": 2 right, 1 missed, 1 said wrongly.
TWO = Labelled(
    ["no", "yes"],
    [1, 1, 1, 0, 0],
    [[0.1, 0.9], [0.4, 0.6], [0.7, 0.3], [0.2, 0.8], [0.9, 0.1]],
)
THREE = Labelled(
    ["a", "b", "c"],
    [0, 0, 1, 2],
    [[0.8, 0.1, 0.1], [0.2, 0.6, 0.2], [0.1, 0.8, 0.1], [0.3, 0.3, 0.4]],
)


def test_two_labels() -> None:
    found = of_labels(["accuracy", "precision", "recall", "f1", "auc", "loss"], TWO)
    assert found["accuracy"] == pytest.approx(3 / 5)
    # Of "no" one is right, one missed, one said wrongly.
    for family in ("precision", "recall", "f1"):
        assert found[family] == pytest.approx((2 / 3 + 1 / 2) / 2)
        each = of_labels([f"{family}_per_class"], TWO)
        assert each[f"{family}_per_class/yes"] == pytest.approx(2 / 3)
    # Of the 6 pairs of a yes and a no: 0.9 beats both, 0.6 and 0.3 beat 0.1 alone.
    assert found["auc"] == pytest.approx(4 / 6)
    wanted = -sum(math.log(p) for p in (0.9, 0.6, 0.3, 0.2, 0.9)) / 5
    assert found["loss"] == pytest.approx(wanted)


def test_several_labels() -> None:
    found = of_labels(["f1", "f1_macro", "f1_micro", "f1_per_class", "precision_per_class"], THREE)
    each = {"a": 2 / 3, "b": 2 / 3, "c": 1.0}
    assert found["f1"] == found["f1_macro"] == pytest.approx(sum(each.values()) / 3)
    assert found["f1_micro"] == pytest.approx(3 / 4)
    assert {name: found[f"f1_per_class/{name}"] for name in each} == pytest.approx(each)
    assert found["precision_per_class/b"] == pytest.approx(1 / 2)


def test_auc_of_several_labels_is_the_mean_of_each_against_the_rest() -> None:
    # Of a: 0.8 beats 0.1 and 0.3, 0.2 beats 0.1 alone: 3 of 4 pairs. b and c beat all.
    assert of_labels(["auc"], THREE)["auc"] == pytest.approx((3 / 4 + 1 + 1) / 3)


def test_a_label_that_never_occurs() -> None:
    rows = Labelled(["a", "b", "c"], [0, 1], [[0.9, 0.05, 0.05], [0.2, 0.7, 0.1]])
    assert of_labels(["f1_per_class"], rows)["f1_per_class/c"] == 0.0
    with pytest.raises(RemoteError, match="none of 'c'"):
        of_labels(["auc"], rows)


def test_certainty_that_was_wrong_is_finite() -> None:
    rows = Labelled(["a", "b"], [1], [[1.0, 0.0]])
    assert 100 < of_labels(["loss"], rows)["loss"] < 105


def test_every_classifier_metric_gives_something() -> None:
    for metric in CLASSIFIER:
        found = of_labels([metric], TWO)
        assert found and all(math.isfinite(value) for value in found.values()), metric


def test_values() -> None:
    rows = Valued([1.0, 2.0, 3.0, 4.0], [1.0, 3.0, 2.0, 5.0])
    found = of_values(["spearman", "loss"], rows)
    assert found == pytest.approx({"spearman": 1 - 6 * 2 / (4 * 15), "loss": (1 + 1 + 1) / 4})
    with pytest.raises(RemoteError, match=r"spearman is not defined: of 2 rows"):
        of_values(["spearman"], Valued([1.0, 2.0], [3.0, 3.0]))


def test_answers() -> None:
    rows = Answered(["the cat sat on the mat", "no"], ["the cat sat on the mat", " yes\n"])
    found = of_answers(["exact_match", "bleu", "chrf"], rows)
    assert found["exact_match"] == 0.5
    assert 0 < found["bleu"] < 100
    assert 0 < found["chrf"] < 100
    same = Answered(["the cat sat on the mat"], ["the cat sat on the mat"])
    assert of_answers(["bleu", "chrf"], same) == pytest.approx({"bleu": 100.0, "chrf": 100.0})


def test_scores_are_weighted_by_tokens() -> None:
    rows = Scored([-1.0, -8.0], [1, 4])
    found = of_outcome(["loss", "perplexity", "bleu"], rows)
    assert found == pytest.approx({"loss": 9 / 5, "perplexity": math.exp(9 / 5)})
    with pytest.raises(RemoteError, match="no token"):
        of_scores(["loss"], Scored([0.0], [0]))


def test_what_does_not_fit() -> None:
    check_fit(["f1", "loss"], "classify")
    with pytest.raises(RemoteError, match="unknown metric 'magic': there are loss, perplexity"):
        check_fit(["magic"], "classify")
    with pytest.raises(RemoteError, match="f1 does not fit a model whose task is 'generate': loss"):
        check_fit(["f1"], "generate")
    with pytest.raises(RemoteError, match="'embed': spearman do"):
        check_fit(["bleu"], "embed")
