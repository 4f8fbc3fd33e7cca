"""The measured speed of reading is that of bytes that were read."""

from libllm.bench.bandwidth import read_bandwidth


def test_reading_takes_time_and_more_than_one_core_may_read() -> None:
    for cores in (1, 2):
        found = read_bandwidth(cores, total=1 << 22, seconds=0.01)
        assert 1e7 < found < 1e13
