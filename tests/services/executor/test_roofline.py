from pathlib import Path

import pytest
from llmservices.executor import roofline
from llmservices.executor.roofline import Gauge
from llmservices.models.native.bindings import FLOAT32, Functions


def test_every_instruction_set_has_ceilings(
    functions: Functions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(roofline, "DOT_ROUNDS", 1000)
    for isa in functions.llm_isas().decode().split():
        found = Gauge(functions, threads=2, buffer_bytes=1 << 20, isa=isa).measure()
        assert found.read_bytes_per_s > 0
        assert set(found.dot_operations_per_s) == {"float32", "bfloat16", "int8"}
        assert all(each > 0 for each in found.dot_operations_per_s.values())


def test_what_cannot_be_measured_is_no_figure(functions: Functions) -> None:
    assert functions.llm_dot_peak(FLOAT32, 1000, 1, b"none") == 0
    assert functions.llm_dot_peak(FLOAT32, 0, 1, b"") == 0
    assert functions.llm_dot_peak(FLOAT32, 1000, 0, b"") == 0
    assert functions.llm_read_bandwidth(0, 0, 1, b"") == 0
    assert functions.llm_read_bandwidth(0, 1 << 20, 1, b"none") == 0


def test_the_buffer_is_larger_than_all_caches(tmp_path: Path) -> None:
    for index, size in enumerate(("32K", "1024K", "32768K")):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(size + "\n")
    assert roofline.beyond_caches(1 << 20, tmp_path) == 4 * (32 + 1024 + 32768) << 10
    assert roofline.beyond_caches(1 << 30, tmp_path) == 1 << 30
    assert roofline.beyond_caches(5, tmp_path / "nothing") == 5
