import json
import sys

import pytest
import torch
from llmservices.executor import bench


def test_it_prints_its_figures(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = "bench --shape tiny --dtype float32 --streams 2 --prompt 8 --output 4 --prefill 20"
    monkeypatch.setattr(sys, "argv", [*words.split(), "--repeat", "1", "--threads", "1"])
    before = torch.get_num_threads()
    try:
        bench.main()
    finally:
        torch.set_num_threads(before)
    report = json.loads(capsys.readouterr().out)
    assert report["decode_tokens_per_s"]["2"]["median"] > 0
    assert report["prefill_tokens_per_s"]["20"]["median"] > 0
