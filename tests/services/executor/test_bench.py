import json
import sys

import msgspec
import pytest
import torch
from llmservices.executor import bench, roofline
from llmservices.executor.bench_report import Report
from llmservices.models.native.bindings import Functions
from llmservices.models.shapes import SHAPES

WORDS = (
    "bench --shape tiny --dtype float32 --streams 2 3 --context 8 40 --output 4 --prefill 20 "
    "--repeat 1 --threads 1 --buffer-mib 2"
)
SHAPE = SHAPES["tiny"]
WEIGHTS = SHAPE.vocab * SHAPE.hidden + SHAPE.layers * SHAPE.hidden * (
    (2 * SHAPE.heads + 2 * SHAPE.kv_heads) * SHAPE.head_dim + 3 * SHAPE.inner
)


def printed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: str
) -> str:
    monkeypatch.setattr(sys, "argv", [*WORDS.split(), *words])
    monkeypatch.setattr(roofline, "CACHES_TIMES", 0)
    monkeypatch.setattr(roofline, "DOT_ROUNDS", 1000)
    before = torch.get_num_threads()
    try:
        bench.main()
    finally:
        torch.set_num_threads(before)
    return capsys.readouterr().out


def report_of(text: str) -> Report:
    return msgspec.convert(json.loads(text), Report)


@pytest.mark.parametrize(
    ("weights", "path", "dot"),
    [
        ("auto", "native", "float32"),
        ("int8", "native", "int8"),
        ("int4", "native", "int8"),
        ("auto", "torch", "float32"),
    ],
)
def test_figures_are_consistent(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    functions: Functions,
    weights: str,
    path: str,
    dot: str,
) -> None:
    words = ("--json", "--weights", weights, "--path", path)
    report = report_of(printed(capsys, monkeypatch, *words))
    cases = [(each.case, each.streams, each.context) for each in report.figures]
    decodes = [("decode", streams, context) for context in (8, 40) for streams in (2, 3)]
    assert cases == [*decodes, ("prefill", 1, 20)]
    assert {path, report.path.split()[0]} <= set(report.path.split())
    for each in report.figures:
        assert each.dot == dot
        rate = each.tokens_per_s
        assert 0 < rate.least <= rate.median <= rate.greatest
        assert each.dot_peak is not None and each.dot_peak.least > 0
        assert each.operations_per_s == pytest.approx(rate.median * each.operations_per_token)
        assert each.arithmetic_fraction == pytest.approx(
            each.operations_per_s / each.dot_peak.median
        )
    for each in report.figures[:4]:
        assert each.bytes_per_token is not None and each.read_bytes_per_s is not None
        assert each.read_bandwidth is not None and each.read_bandwidth.least > 0
        assert each.read_bytes_per_s == pytest.approx(
            each.tokens_per_s.median * each.bytes_per_token
        )
        assert each.bandwidth_fraction == pytest.approx(
            each.read_bytes_per_s / each.read_bandwidth.median
        )
    few, many = report.figures[0], report.figures[1]
    assert few.bytes_per_token is not None and many.bytes_per_token is not None
    # What streams share is read once for all of them.
    shared = (few.bytes_per_token - many.bytes_per_token) / (1 / 2 - 1 / 3)
    assert shared == pytest.approx(report.weight_bytes)


def test_what_a_token_costs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, functions: Functions
) -> None:
    report = report_of(printed(capsys, monkeypatch, "--json"))
    assert report.weight_bytes == pytest.approx(4 * WEIGHTS)
    for each in report.figures[:4]:
        # The steps that are measured make the second to the fourth token.
        context = each.context + 2
        kv_bytes = 4 * 2 * SHAPE.layers * SHAPE.kv_heads * SHAPE.head_dim
        assert each.bytes_per_token == pytest.approx(
            report.weight_bytes / each.streams + kv_bytes * context
        )
        attention = 4 * SHAPE.layers * SHAPE.heads * SHAPE.head_dim * context
        assert each.operations_per_token == pytest.approx(2 * WEIGHTS + attention)
    prefill = report.figures[4]
    head = 2 * SHAPE.vocab * SHAPE.hidden
    attention = 4 * SHAPE.layers * SHAPE.heads * SHAPE.head_dim * 210
    assert prefill.operations_per_token == pytest.approx(
        2 * WEIGHTS - head + (head + attention) / 20
    )


def test_without_a_library_there_are_no_fractions(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "open_library", lambda: "native step not built")
    report = report_of(printed(capsys, monkeypatch, "--json", "--path", "torch"))
    assert all(each.arithmetic_fraction is None for each in report.figures)
    assert all(each.bandwidth_fraction is None for each in report.figures)
    assert report.dot_operations_per_s == {}
    with pytest.raises(SystemExit, match="not built"):
        printed(capsys, monkeypatch)


def test_people_get_a_table(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, functions: Functions
) -> None:
    lines = printed(capsys, monkeypatch).splitlines()
    assert sum("decode" in line for line in lines) == 4
    assert sum("prefill" in line and " float32" in line for line in lines) == 1
