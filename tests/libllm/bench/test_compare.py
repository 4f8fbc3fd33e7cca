"""Comparisons: rates and ratios by hand, and a real run beside `transformers`."""

import asyncio
import json
import sys
import tomllib
from pathlib import Path

import llmservices.models
import pytest
from libllm.bench.compare.__main__ import compare, parser, peers_of
from libllm.bench.compare.cases import CASES, Case, cases_of, results
from libllm.bench.compare.peers import (
    Driven,
    LlamaCpp,
    Peer,
    bits_of_folder,
    bits_of_gguf,
    seed_of,
    speed_tg,
)
from libllm.bench.compare.weights import config_of
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
        LlamaCpp("llama.cpp", tmp_path, tmp_path / "model-bf16.gguf", 1),
        Driven("vllm", tmp_path / "python", [], {}, bits=16),
        # This interpreter runs, and has no such engine.
        Driven("openvino", Path(sys.executable), [], {}, bits=8),
    ]
    for peer in absent:
        with pytest.raises(RemoteError, match=peer.name) as refused:
            await peer.start()
        assert refused.value.kind is ErrorKind.UNAVAILABLE
        await peer.stop()


@pytest.mark.parametrize(
    ("name", "bits"),
    [("m-bf16", 16), ("m.F16", 16), ("q05-q8_0", 8), ("m-Q4_K_M", 4), ("m-f32", 32)],
)
def test_bits_by_the_name_of_a_gguf_file(name: str, bits: int) -> None:
    assert bits_of_gguf(Path(f"{name}.gguf")) == bits


def test_a_gguf_file_of_another_name_is_refused() -> None:
    with pytest.raises(RemoteError, match="q8_0 or the like"):
        bits_of_gguf(Path("model.gguf"))


def test_bits_by_the_configuration_of_a_folder(tmp_path: Path) -> None:
    quantized = {"config_groups": {"group_0": {"weights": {"num_bits": 8}}}}
    for config, dtype, bits in (
        ({"dtype": "bfloat16"}, "auto", 16),
        ({"torch_dtype": "float32"}, "auto", 32),
        ({"dtype": "float32"}, "bfloat16", 16),
        ({"dtype": "bfloat16", "quantization_config": quantized}, "bfloat16", 8),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert bits_of_folder(tmp_path, dtype) == bits


@pytest.mark.parametrize("text", ["", "[gateway]\nport = 0\n", '[executor]\nmode = "exact"\n'])
def test_the_configuration_gets_the_weights_and_keeps_the_rest(text: str) -> None:
    assert config_of(text, "auto") == text
    made = tomllib.loads(config_of(text, "int8"))
    assert made["executor"].pop("weights") == "int8"
    assert {name: table for name, table in made.items() if table} == tomllib.loads(text)


def test_no_prompts_of_two_measurements_are_alike() -> None:
    seeds = [
        seed_of(case, output, salt)
        for case in CASES.values()
        for output in (1, 128)
        for salt in (0, 1, 2)
    ]
    assert len(set(seeds)) == len(seeds)


def fake_engine(folder: Path, *lines: str) -> Driven:
    """A program of these lines, which know `serve`, in the place of an interpreter."""
    script = folder / "engine"
    first = (f"#!{sys.executable}", "from libllm.bench.compare.drivers.lines import serve")
    script.write_text("".join(f"{line}\n" for line in (*first, *lines)))
    script.chmod(0o755)
    return Driven("fake", script, [], {}, bits=16)


async def test_what_an_engine_prints_is_no_answer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    peer = fake_engine(
        tmp_path,
        "print('INFO loading', flush=True)",
        "serve('fake', '7', lambda prompts, output: print('INFO step'), vocabulary=99)",
    )
    try:
        assert await peer.start() == "7"
        assert await peer.rate(Case("d", 2, 4, 3), 1) > 0
    finally:
        await peer.stop()
    assert "INFO loading" in capsys.readouterr().err


async def test_an_engine_stands_still_while_others_are_measured(tmp_path: Path) -> None:
    peer = fake_engine(
        tmp_path,
        "import os, threading",
        "def spin():",
        "    while True: pass",
        "threading.Thread(target=spin, daemon=True).start()",
        "serve('fake', str(os.getpid()), lambda prompts, output: None, vocabulary=99)",
    )
    try:
        stat = Path(f"/proc/{await peer.start()}/stat")
        for _ in range(2):
            async with asyncio.timeout(5):
                while stat.read_text().rpartition(")")[2].split()[0] != "T":  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            assert await peer.rate(Case("d", 2, 4, 3), 1) > 0
    finally:
        await peer.stop()


@pytest.mark.long
async def test_a_real_comparison_skips_who_is_not_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = parser().parse_args(
        [str(EMBEDDED), "--transformers", "--dtype", "float32", "--vllm", str(tmp_path / "python")]
    )
    cases = cases_of("2x16+8,decode-1")
    found = await compare(peers_of(said), cases, 2, EMBEDDED, every=True)
    assert set(found.versions) == {"llmos", "transformers"}
    assert "skipped: vllm" in capsys.readouterr().err
    assert set(found.tokens_per_s) == {"2x16+8", "decode-1"}
    for by_peer in found.tokens_per_s.values():
        assert set(by_peer) == {"llmos", "transformers"}
        assert all(len(rates) == 2 and min(rates) > 0 for rates in by_peer.values())
    assert len(found.read_bytes_per_s) == 2
    assert 0 < found.kv_bytes < 1 << 28
    assert found.first_token_s["llmos"] > 0
    assert found.resident_bytes["llmos"] > found.weight_bytes
