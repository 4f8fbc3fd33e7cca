"""`llmos bench prefixes`: how much of shared prefixes this system does not compute again.

    llmos bench prefixes -- FOLDER --mooncake conversation_first2000.jsonl --rows 400

Rows of the trace in their order, hash ids as real shared tokens; one at a time unless said
otherwise, so that a time to the first token is computing, not waiting.
"""

import argparse
import asyncio
import hashlib
import json
import re
import statistics
import sys
from collections import OrderedDict
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import Final

import msgspec
from llmproto.errors import ErrorKind, RemoteError, invalid
from rich.console import Console
from rich.table import Table

from libllm.bench.compare import goals
from libllm.bench.compare.peers import NAME
from libllm.bench.compare.record import Prefixes
from libllm.bench.compare.weights import config_with
from libllm.bench.serve.run import run_load
from libllm.bench.serve.servers import Target
from libllm.bench.serve.timeline import Timeline
from libllm.bench.serve.workload import Ask, Lengths, Shape, mooncake, synthetic
from libllm.bench.system import generate, prompt_of, system
from libllm.client import AsyncClient

BLOCK_TOKENS: Final = 32
HIT: Final = "90 %"
MISS: Final = "none"
SHARES: Final = ((0.9, HIT), (0.5, "50-90 %"), (0.1, "10-50 %"), (0.0, MISS))
"""A hit computes the end of its prompt alone, a miss (less than a tenth) as good as all of it."""
ENGINE_BLOCK_TOKENS: Final = 16
"""Of a KV block of the executor."""
REPORT_S: Final = 0.5
REPORTS_MAX: Final = 60


def parser() -> argparse.ArgumentParser:
    """Every option."""
    found = argparse.ArgumentParser(
        prog="llmos bench prefixes",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    found.add_argument("folder", type=Path, help="a model folder")
    found.add_argument("--mooncake", type=Path, required=True, help="the trace (JSON lines)")
    found.add_argument("--rows", type=int, default=400)
    found.add_argument("--block", type=int, default=BLOCK_TOKENS, help="tokens a hash id")
    found.add_argument("--prompt-max", type=int)
    found.add_argument("--output-max", type=int, default=4)
    found.add_argument("--vocabulary", type=int, default=2000, help="token ids are below this")
    found.add_argument("--concurrency", type=int, default=1)
    found.add_argument("--speed", type=float, help="of the trace, instead of one after another")
    found.add_argument("--kv-bytes", type=int, default=4 << 30, help="size of the KV cache")
    found.add_argument("--config", type=Path, help="config.toml for the system")
    found.add_argument("--json", action="store_true", help="a record for `llmos bench goals`")
    return found


def reusable(asks: Sequence[Ask], block_tokens: int, cache_tokens: float) -> list[int]:
    """Of each prompt, the tokens in leading whole blocks that are in a cache of so many tokens,
    which holds the blocks of the prompts before it and forgets what was not used for longest."""
    cache: OrderedDict[bytes, None] = OrderedDict()
    found = []
    for ask in asks:
        keys = _keys(ask.prompt, block_tokens)
        leading = list(takewhile(cache.__contains__, keys))
        for key in reversed(keys):  # the end of a prefix goes before its beginning
            cache[key] = None
            cache.move_to_end(key)
        while len(cache) * block_tokens > cache_tokens:
            cache.popitem(last=False)
        found.append(len(leading) * block_tokens)
    return found


def _keys(ids: Sequence[int], block_tokens: int) -> list[bytes]:
    """One for each whole block and all before it."""
    keys, before = [], b""
    for end in range(block_tokens, len(ids) + 1, block_tokens):
        block = msgspec.msgpack.encode(ids[end - block_tokens : end])
        before = hashlib.blake2b(before + block, digest_size=16).digest()
        keys.append(before)
    return keys


def record_of(
    asks: Sequence[Ask],
    lines: Sequence[Timeline],
    *,
    block_tokens: int,
    cache_tokens: int,
    cached_tokens: int,
) -> Prefixes:
    """What was measured, beside what could have been."""
    most = reusable(asks, block_tokens, float("inf"))
    here = reusable(asks, block_tokens, cache_tokens)
    times: dict[str, list[float]] = {name: [] for _, name in SHARES}
    for ask, line, tokens in zip(asks, lines, most, strict=True):
        if not line.error:
            share = tokens / len(ask.prompt)
            name = next(name for least, name in SHARES if share >= least)
            times[name].append(1000 * (line.arrivals_s[0] - line.sent_s))
    medians = {name: statistics.median(some) for name, some in times.items() if some}
    return Prefixes(
        rows=len(asks),
        prompt_tokens=sum(len(ask.prompt) for ask in asks),
        cached_tokens=cached_tokens,
        reusable_tokens=sum(most),
        reusable_here_tokens=sum(here),
        cache_tokens=cache_tokens,
        ttft_ms=medians,
        counts={name: len(some) for name, some in times.items()},
        hit_over_miss=(
            medians[HIT] / medians[MISS] if HIT in medians and MISS in medians else None
        ),
        failed=sum(bool(line.error) for line in lines),
    )


def counters(text: str) -> dict[str, float]:
    """Of the executors, by name, from Prometheus' text format; those of several are added."""
    found: dict[str, float] = {}
    for name, value in re.findall(
        r"^llmos_executor_(\w+?)(?:\{[^}]*\})? ([0-9.e+]+)$", text, re.MULTILINE
    ):
        found[name] = found.get(name, 0.0) + float(value)
    return found


async def measure(said: argparse.Namespace) -> Prefixes:
    """The run."""
    shape = Shape(said.vocabulary, 0, said.prompt_max, said.output_max)
    speed = said.speed or 1.0
    asks = mooncake(said.mooncake, said.rows, shape, speed=speed, block_tokens=said.block)
    if not asks:
        raise invalid(f"{said.mooncake}: no rows")
    text = said.config.read_text() if said.config else "[gateway]\nport = 0\n"
    config = config_with(text, f"kv_bytes = {said.kv_bytes}")
    async with system(config) as (client, home, _):
        await client.add_model(said.folder, NAME)
        await generate(client, prompt_of(16, 1), 2, NAME)
        warm = synthetic(2, Shape(said.vocabulary, 1), prompt=Lengths(64, 64), output=Lengths(4, 4))
        target = Target("system", home=str(home.root), model=NAME)
        await run_load(target, warm, concurrency=1, processes=1)
        before = await _counted(client, 2 + sum(ask.output_tokens for ask in warm))
        _, lines = await run_load(
            target,
            asks,
            concurrency=None if said.speed else said.concurrency,
            processes=1,
        )
        wanted = before["tokens_total"] + sum(line.output_tokens for line in lines)
        after = await _counted(client, wanted)
    return record_of(
        asks,
        lines,
        block_tokens=said.block,
        cache_tokens=int(after["blocks"]) * ENGINE_BLOCK_TOKENS,
        cached_tokens=int(after["cached_tokens_total"] - before["cached_tokens_total"]),
    )


async def _counted(client: AsyncClient, tokens: float) -> dict[str, float]:
    """The counters, once so many tokens are in them: reports come some time after the fact."""
    for _ in range(REPORTS_MAX):
        found = counters(await client.metrics())
        if found.get("tokens_total", 0.0) >= tokens:
            return found
        await asyncio.sleep(REPORT_S)
    raise RemoteError(
        ErrorKind.INTERNAL, f"the executor did not count {tokens:.0f} tokens: {found}"
    )


def show(found: Prefixes) -> None:
    """For people."""
    table = Table(title="time to the first token by the share of the prompt that could be reused")
    for head in ("reusable", "rows", "median ms"):
        table.add_column(head, justify="left" if head == "reusable" else "right")
    for _, name in SHARES:
        median = found.ttft_ms.get(name)
        table.add_row(name, str(found.counts[name]), "-" if median is None else f"{median:.1f}")
    Console().print(table)
    print(
        f"{found.rows} rows, {found.failed} failed, {found.prompt_tokens} prompt tokens: "
        f"{found.reusable_tokens} reusable, {found.reusable_here_tokens} by a cache of "
        f"{found.cache_tokens}; {found.cached_tokens} were not computed"
    )
    Console().print(goals.table(goals.lines([found])))


def main() -> None:
    """The command."""
    said = parser().parse_args()
    try:
        found = asyncio.run(measure(said))
    except RemoteError as error:
        sys.exit(f"llmos bench prefixes: {error.kind.value}: {error.detail}")
    if said.json:
        print(json.dumps(msgspec.to_builtins(found), indent=1))
    else:
        show(found)


if __name__ == "__main__":
    main()
