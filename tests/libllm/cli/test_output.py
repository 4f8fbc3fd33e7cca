"""Units and documents."""

import pytest
from libllm.cli.output import duration, plain, size


@pytest.mark.parametrize(
    ("milliseconds", "text"),
    [
        (0, "0ms"),
        (999, "999ms"),
        (12_400, "12s"),
        (250_000, "4m10s"),
        (10_920_000, "3h02m"),
        (435_600_000, "5d01h"),
    ],
)
def test_durations(milliseconds: int, text: str) -> None:
    assert duration(milliseconds) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 kB"), (4_089_446, "3.9 MB"), (1 << 50, "1024.0 TB")],
)
def test_sizes(count: int, text: str) -> None:
    assert size(count) == text


def test_ids_are_hexadecimal() -> None:
    assert plain({"id": b"\x00\xff", "rows": [(b"\x01", None)]}) == {
        "id": "00ff",
        "rows": [["01", None]],
    }
