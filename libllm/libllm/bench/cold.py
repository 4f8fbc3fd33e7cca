"""`llmos bench cold -- FOLDER`: what it costs to ask for a model that is not loaded.

Seconds from the request to the first token, the weights' file in the page cache; what memory the
executor's process took at its peak, after it, and with many streams, beside the bytes of weights
and of the KV that those streams fill.
"""

import argparse
import asyncio
import json
from pathlib import Path
from typing import Final

from libllm.bench.compare.weights import Weights, config_of, weights_of
from libllm.bench.folders import kv_token_bytes, weight_bytes
from libllm.bench.processes import Used, used
from libllm.bench.system import Figures, generate, median, prompt_of, system
from libllm.client import AsyncClient

CONFIG: Final = '[services]\nrun = ["tokenizer"]\n[executor]\nidle_ms = 500\n'
NAME: Final = "cold"
READ_BYTES: Final = 1 << 24


async def measure(
    folder: Path, weights: Weights, *, repeat: int, streams: int, prompt: int, output: int
) -> Figures:
    """A system of its own, the model loaded anew so many times."""
    read_through(folder)
    firsts: list[float] = []
    cpu: list[float] = []
    peaks: list[int] = []
    rested: list[int] = []
    async with system(config_of(CONFIG, weights)) as (client, _, _):
        await client.add_model(folder.resolve(), NAME)
        for salt in range(repeat):
            await _until_unloaded(client)
            first, _ = await generate(client, prompt_of(prompt, salt), 1, NAME)
            now = used(await _pid(client))
            firsts.append(first)
            cpu.append(now.whole_cpu_s)
            peaks.append(now.peak_bytes)
            rested.append(now.resident_bytes)
        path = next(row.path for row in await client.models() if row.model.name == NAME)
        busy = await _with_streams(client, streams, prompt, output)
    kv_bytes = streams * (prompt + output) * kv_token_bytes(folder)
    return {
        "path": path,
        "first_token_s": median(firsts),
        "first_token_s_worst": max(firsts),
        "executor_cpu_s": median(cpu),
        "peak_bytes": max(peaks),
        "resident_bytes": max(rested),
        "weight_file_bytes": weight_bytes(folder),
        f"resident_bytes_of_{streams}_streams": busy.resident_bytes,
        f"kv_bytes_of_{streams}_streams": kv_bytes,
    }


def read_through(folder: Path) -> None:
    """Bring the weights into the page cache."""
    for path in folder.glob("*.safetensors"):
        with path.open("rb", buffering=0) as file:
            while file.read(READ_BYTES):
                pass


async def _with_streams(client: AsyncClient, streams: int, prompt: int, output: int) -> Used:
    """The executor's process when all of them have just ended."""
    asks = [generate(client, prompt_of(prompt, 1000 + n), output, NAME) for n in range(streams)]
    await asyncio.gather(*asks)
    return used(await _pid(client))


async def _pid(client: AsyncClient) -> int:
    """Of the model's executor, which lives for a while after its last thread."""
    rows = [row for row in await client.ps() if row.model == NAME and row.pid is not None]
    assert rows and rows[0].pid is not None, "unloaded before it was looked at"
    return rows[0].pid


async def _until_unloaded(client: AsyncClient) -> None:
    """Until no executor holds the model, nor its memory."""
    while any(row.model == NAME for row in await client.ps()):  # noqa: ASYNC110 - a table elsewhere
        await asyncio.sleep(0.02)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="llmos bench cold", description=__doc__)
    parser.add_argument("folder", type=Path, help="a model folder (`llmos bench shape` makes one)")
    parser.add_argument(
        "--weights", type=weights_of, default="auto", help="auto, int8, int4, joined by commas"
    )
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--output", type=int, default=128)
    said = parser.parse_args()
    for weights in said.weights:
        measured = asyncio.run(
            measure(
                said.folder,
                weights,
                repeat=said.repeat,
                streams=said.streams,
                prompt=said.prompt,
                output=said.output,
            )
        )
        print(json.dumps({weights: measured}, indent=1), flush=True)


if __name__ == "__main__":
    main()
