"""That the measure measures."""

from pathlib import Path

from llmservices.store.bench import Buffer, measure


def test_a_small_one(tmp_path: Path) -> None:
    buffer = Buffer(tmp_path / "buffer", 0.002)
    measured = measure(tmp_path, buffer, 2)
    assert measured["bytes"] == buffer.bytes
    seconds = measured["seconds"]
    assert isinstance(seconds, dict)
    assert {name: len(times) for name, times in seconds.items()} == {
        "save": 2, "write": 2, "load": 2, "read": 2,
    }  # fmt: skip
