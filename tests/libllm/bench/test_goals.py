"""Goals, judged on records made by hand."""

from pathlib import Path

import msgspec
import pytest
from libllm.bench.compare.goals import GOALS, hardest, lines, wanted
from libllm.bench.compare.record import Compared, Loaded, Mixed, Prefixes, read
from libllm.bench.serve.timeline import summarize
from llmproto.errors import RemoteError

RECORD = Compared(
    bits={
        "llmos": 16,
        "llmos-int8": 8,
        "llmos-int4": 4,
        "llama.cpp-m-bf16": 16,
        "llama.cpp-m-q4_0": 4,
        "vllm": 16,
    },
    versions={},
    ours=["llmos", "llmos-int8", "llmos-int4"],
    tokens_per_s={
        "decode-1": {
            "llmos": [40.0, 44.0],
            "llmos-int8": [70.0, 70.0],
            "llmos-int4": [100.0, 110.0],
            "llama.cpp-m-bf16": [40.0, 40.0],
            "llama.cpp-m-q4_0": [80.0, 80.0],
            "vllm": [20.0, 20.0],
        },
        "decode-8": {"llmos": [300.0, 300.0], "llmos-int8": [400.0, 500.0], "vllm": [200.0, 500.0]},
    },
    weight_bytes=1_000_000_000,
    read_bytes_per_s=[40e9, 55e9],
    first_token_s={"llmos": 2.0},
    resident_bytes={"llmos": 2_000_000_000},
    kv_bytes=100_000_000,
)


def test_one_stream_is_compared_at_the_same_precision() -> None:
    found = hardest(GOALS[0], RECORD)
    assert found is not None
    ours, peer, ratio = found
    assert (ours, peer) == ("llmos", "llama.cpp-m-bf16")
    assert ratio.ratio == pytest.approx(1.05)
    found = hardest(GOALS[1], RECORD)
    assert found is not None
    assert found[:2] == ("llmos-int4", "llama.cpp-m-q4_0")


def test_many_streams_are_compared_at_the_best_of_eight_bits_or_more() -> None:
    found = hardest(GOALS[2], RECORD)
    assert found is not None
    ours, peer, ratio = found
    assert (ours, peer) == ("llmos-int8", "vllm")
    assert (ratio.ratio_low, ratio.ratio_high) == (1.0, 2.0)


def test_what_was_not_measured_has_no_line_and_no_ratio() -> None:
    assert hardest(GOALS[3], RECORD) is None
    assert [line.goal for line in lines([RECORD])] == [
        "decode-1, 16 bits",
        "decode-1, 4 bits",
        "decode-8, 8 bits or more",
        "decode-1, read bandwidth",
        "first token, model not loaded",
        "executor RSS, most streams",
    ]


def test_over_several_records_the_hardest_peer_counts() -> None:
    other = msgspec.structs.replace(
        RECORD,
        tokens_per_s={"decode-1": {"llmos": [40.0, 40.0], "vllm": [50.0, 50.0]}},
    )
    first = lines([RECORD, other])[0]
    assert (first.measured, first.kept) == ("0.80 x (0.80-0.80), llmos over vllm", False)


def test_the_share_of_bandwidth_is_that_of_its_round() -> None:
    line = next(one for one in lines([RECORD]) if one.goal == "decode-1, read bandwidth")
    assert line.measured == "90 % (80-100) of 47.5 GB/s"
    assert line.kept


def test_memory_and_the_first_token() -> None:
    by_goal = {line.goal: line for line in lines([RECORD])}
    assert by_goal["first token, model not loaded"].kept
    memory = by_goal["executor RSS, most streams"]
    assert (memory.must, memory.measured, memory.kept) == ("<= 1665 MB", "2000 MB", False)


@pytest.mark.parametrize(
    ("case", "peer", "bits", "ours", "expected"),
    [
        ("decode-1", "llmos-int8", 8, True, False),
        ("decode-1", "openvino-m-q4_0", 4, False, False),
        ("decode-32", "openvino-m-q8_0", 8, False, True),
        ("decode-32", "llama.cpp-m-q4_0", 4, False, False),
        ("4x16+8", "llama.cpp-m-q4_0", 4, False, True),
    ],
)
def test_only_what_a_goal_compares_is_measured(
    case: str, peer: str, bits: int, ours: bool, expected: bool
) -> None:
    assert wanted(case, peer, bits, ours=ours) is expected


def test_a_load_is_judged_where_the_peer_is_at_its_best() -> None:
    def run(server: str, speed: float, kept: float) -> Loaded:
        ours = server.startswith("llmos")
        return Loaded(server, ours, speed, kept, 2.0, summarize([]))

    runs = [
        *(run("llmos", 0.1, 1.0), run("llmos", 0.2, 1.5), run("llmos-int8", 0.2, 1.8)),
        *(run("vllm", 0.1, 0.9), run("vllm", 0.2, 1.2), run("vllm", 0.4, 0.1)),
    ]
    (line,) = lines([Mixed(runs)])
    assert line.goal == "mixed load, trace at 0.2 x"
    assert line.measured == "1.50 x: llmos-int8 1.800/s, vllm 1.200/s of 2.000/s"
    assert line.kept


def test_prefixes_are_judged_by_both_caches() -> None:
    record = Prefixes(
        rows=10,
        prompt_tokens=1000,
        cached_tokens=270,
        reusable_tokens=310,
        reusable_here_tokens=300,
        cache_tokens=500,
        ttft_ms={},
        counts={},
        hit_over_miss=0.25,
    )
    assert [line.kept for line in lines([record])] == [False, True, False]


def test_records_are_read_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    path.write_bytes(msgspec.json.encode(RECORD))
    assert read(path) == RECORD
    path.write_text("{}")
    with pytest.raises(RemoteError, match="no record"):
        read(path)
