"""Comparisons: rates and ratios by hand, and a real run beside `transformers`."""

import json
import sys
from pathlib import Path

import llmservices.models
import pytest
from libllm.bench.compare.__main__ import compare, parser, peers_of
from libllm.bench.compare.cases import CASES, Case, cases_of, results
from libllm.bench.compare.peers import Driven, LlamaCpp, Peer, speed_tg
from llmproto.errors import ErrorKind, RemoteError

EMBEDDED = Path(llmservices.models.__file__).parent / "embedded"


def test_decode_is_what_comes_after_the_first_tokens() -> None:
    assert Case("d", 8, 128, 11).rate(3.0, 1.0) == pytest.approx(40.0)


def test_prefill_is_the_time_to_the_first_token() -> None:
    assert Case("p", 1, 512, 1).rate(0.0, 2.0) == pytest.approx(256.0)


def test_cases_are_named_or_spelled_out() -> None:
    assert cases_of("decode-8,4x16+32") == [CASES["decode-8"], Case("4x16+32", 4, 16, 32)]


@pytest.mark.parametrize("text", ["decode-9", "x", "1x2", "0x1+1", "1x1+0"])
def test_what_is_no_case_is_refused(text: str) -> None:
    with pytest.raises(RemoteError, match="decode-32"):
        cases_of(text)


def test_ratios_are_taken_within_a_round() -> None:
    found = results({"us": [10.0, 40.0, 30.0], "them": [10.0, 10.0, 20.0]}, "us")
    assert (found["us"].tokens_per_s, found["us"].ratio) == (30.0, None)
    them = found["them"]
    assert (them.tokens_per_s, them.low, them.high) == (10.0, 10.0, 20.0)
    assert (them.ratio, them.ratio_low, them.ratio_high) == (1.5, 1.0, 4.0)


def test_llama_batched_bench_is_read() -> None:
    line = json.dumps({"n_kv_max": 9216, "pl": 8, "speed_pp": 101.5, "speed_tg": 88.25})
    assert speed_tg("noise\n" + line + "\n") == 88.25
    with pytest.raises(RemoteError, match="speed_tg"):
        speed_tg("nothing")


async def test_a_peer_that_is_not_there_says_so(tmp_path: Path) -> None:
    absent: list[Peer] = [
        LlamaCpp("llama.cpp", tmp_path, tmp_path / "model.gguf", 1),
        Driven("vllm", tmp_path / "python", [], {}),
        # This interpreter runs, and has no such engine.
        Driven("openvino", Path(sys.executable), [], {}),
    ]
    for peer in absent:
        with pytest.raises(RemoteError, match=peer.name) as refused:
            await peer.start()
        assert refused.value.kind is ErrorKind.UNAVAILABLE
        await peer.stop()


@pytest.mark.long
async def test_a_real_comparison_skips_who_is_not_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = parser().parse_args(
        [str(EMBEDDED), "--transformers", "--dtype", "float32", "--vllm", str(tmp_path / "python")]
    )
    cases = cases_of("2x16+8,1x32+1")
    versions, found = await compare(peers_of(said), cases, rounds=2)
    assert set(versions) == {"llmos", "transformers"}
    assert "skipped: vllm" in capsys.readouterr().err
    assert set(found) == {"2x16+8", "1x32+1"}
    for by_peer in found.values():
        assert by_peer["llmos"].tokens_per_s > 0
        assert by_peer["transformers"].ratio is not None
