"""The bench of cold starts on the embedded model."""

from pathlib import Path

import llmservices.models
from libllm.bench.cold import measure
from libllm.bench.folders import kv_token_bytes, weight_bytes

EMBEDDED = Path(llmservices.models.__file__).parent / "embedded"


async def test_it_measures_time_and_memory_of_a_model_that_is_not_loaded() -> None:
    found = await measure(EMBEDDED, "auto", repeat=2, streams=3, prompt=8, output=20)
    numbers = {key: value for key, value in found.items() if isinstance(value, int | float)}
    assert len(numbers) == len(found) - 1  # all but the path
    assert all(value > 0 for value in numbers.values())
    assert numbers["first_token_s"] <= numbers["first_token_s_worst"]
    assert numbers["resident_bytes"] <= numbers["peak_bytes"]
    assert numbers["kv_bytes_of_3_streams"] == 3 * 28 * kv_token_bytes(EMBEDDED)
    assert numbers["weight_file_bytes"] == weight_bytes(EMBEDDED)
