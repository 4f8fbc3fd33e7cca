"""Gates: a table of conditions and metrics."""

import pytest
from llmproto.errors import ErrorKind, RemoteError
from llmservices.store.gate import check_gate

METRICS = {"accuracy": 0.87, "eval/loss": 1.25}


@pytest.mark.parametrize(
    "gate",
    ["", " ", "accuracy>=0.87", "accuracy > 0.8, eval/loss<=1.25", "eval/loss<2", "accuracy>=-1e3"],
)
def test_what_holds(gate: str) -> None:
    check_gate(gate, METRICS, of="bot@1")


@pytest.mark.parametrize(
    ("gate", "why"),
    [
        ("accuracy>=0.9", "accuracy is 0.87, not >= 0.9"),
        ("accuracy>=0.8,eval/loss<1.25", "eval/loss is 1.25, not < 1.25"),
        ("f1>=0.5", "no metric 'f1' to judge it by; there is: accuracy, eval/loss"),
        ("accuracy", "'accuracy' is no condition"),
        ("accuracy>=", "is no condition"),
        ("accuracy>=nan", "is no condition"),
        ("accuracy>=inf", "is no condition"),
        ("accuracy>=0.8,", "is no condition"),
        ("accuracy==0.87", "is no condition"),
    ],
)
def test_what_does_not(gate: str, why: str) -> None:
    with pytest.raises(RemoteError) as refused:
        check_gate(gate, METRICS, of="bot@1")
    assert refused.value.kind is ErrorKind.INVALID
    assert why in refused.value.detail


def test_without_metrics() -> None:
    with pytest.raises(RemoteError, match="none: evaluate it first"):
        check_gate("accuracy>=0.1", {}, of="bot@1")
