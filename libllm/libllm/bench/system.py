"""The figures of a whole system on this machine, each against what it is compared with.

Every figure is a median over repetitions; a ratio is taken pair by pair, the two in turn.  Nothing
here judges: it prints what it measured.
"""

import asyncio
import itertools
import json
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from libllm.bench.processes import by_name, used
from libllm.boot import boot_async, is_running
from libllm.client import AsyncClient, open_client
from libllm.config import Home

Figures = dict[str, object]


def cancel_on_sigterm() -> None:
    """SIGTERM cancels this task from now on, so what it started is ended as it would end it."""
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)


@asynccontextmanager
async def system(config: str) -> AsyncIterator[tuple[AsyncClient, Home, float]]:
    """A system in a home of its own: client, home, seconds from nothing to ready.

    The system ends with whoever measured, by SIGTERM too.
    """
    cancel_on_sigterm()
    root = Path(tempfile.mkdtemp(prefix="llmos-"))
    (root / "config.toml").write_text(config)
    home = Home.find(root)
    client: AsyncClient | None = None
    try:
        began = time.perf_counter()
        await boot_async(home, timeout_s=120)
        boot_s = time.perf_counter() - began
        client = await open_client(home)
        yield client, home, boot_s
    finally:
        if is_running(home):  # whoever was cancelled while it booted has none yet
            client = client or await open_client(home)
            await client.shutdown()
        if client is not None:
            await client.aclose()
        while is_running(home):  # noqa: ASYNC110 - another process's file: nothing to wait on
            await asyncio.sleep(0.05)
        shutil.rmtree(root, ignore_errors=True)


def median(values: list[float]) -> float:
    """Of at least one value, to four digits."""
    return float(f"{statistics.median(values):.4g}")


async def generate(
    client: AsyncClient, prompt: list[int], output: int, model: str | None = None
) -> tuple[float, int]:
    """One greedy stream: seconds to its first token, tokens."""
    began = time.perf_counter()
    first = 0.0
    tokens = 0
    stream = await client.generate(
        prompt, stream=True, model=model, max_tokens=output, temperature=0.0, ignore_eos=True
    )
    async for piece in stream:
        if not first and piece.tokens:
            first = time.perf_counter() - began
        tokens = max(tokens, piece.tokens)
    return first, tokens


def prompt_of(tokens: int, salt: int | str) -> list[int]:
    """Token ids that no prompt of another salt begins with: nothing of it is in a cache."""
    chance = random.Random(salt)
    return [chance.randrange(256) for _ in range(tokens)]


# --- boot, idle, memory ---------------------------------------------------------------------------


async def measure_boot(repeat: int) -> Figures:
    """From nothing to ready, the embedded model loaded; and what runs then when nobody asks."""
    boots: list[float] = []
    idle: dict[str, float] = {}
    resident: dict[str, int] = {}
    for number in range(repeat):
        async with system("[gateway]\nport = 0\n") as (client, _, boot_s):
            boots.append(boot_s)
            if number:
                continue
            await asyncio.sleep(3)  # the measured thing: a system at rest
            before = by_name(await client.ps())
            await asyncio.sleep(10)
            after = by_name(await client.ps())
            idle = {n: (after[n].cpu_s - before[n].cpu_s) / 10 for n in after if n in before}
            resident = {name: one.resident_bytes for name, one in after.items()}
    return {
        "boot_s": median(boots),
        "idle_core_percent": round(100 * sum(idle.values()), 3),
        "idle_core_percent_by_process": {n: round(100 * v, 3) for n, v in idle.items()},
        "resident_mb": {name: round(size / 1e6, 1) for name, size in resident.items()},
    }


# --- the system's own time for each token ---------------------------------------------------------


async def measure_cpu(streams: int, output: int, repeat: int) -> Figures:
    """User and system time of kernel, tokenizer and one client, for each delivered token."""
    found: dict[str, list[float]] = {"kernel": [], "tokenizer": [], "client": []}
    async with system("[gateway]\nport = 0\n") as (client, _, _):
        await generate(client, prompt_of(8, 0), 8)
        for salt in range(repeat):
            before = by_name(await client.ps())
            mine = used(os.getpid()).cpu_s
            asks = [
                generate(client, prompt_of(16, salt * streams + number + 1), output)
                for number in range(streams)
            ]
            tokens = sum(count for _, count in await asyncio.gather(*asks))
            found["client"].append((used(os.getpid()).cpu_s - mine) / tokens)
            after = by_name(await client.ps())
            for name in ("kernel", "tokenizer"):
                found[name].append((after[name].cpu_s - before[name].cpu_s) / tokens)
    each = {name: round(1e6 * median(values), 2) for name, values in found.items()}
    return {"cpu_us_per_token": round(sum(each.values()), 2), "by_process": each}


# --- recovery -------------------------------------------------------------------------------------


async def measure_recovery(repeat: int, journaled_tokens: int) -> Figures:
    """SIGKILL to the next token on running streams."""
    config = "[gateway]\nport = 0\n[executor]\nresidents_max = 256\n"
    found: dict[str, list[float]] = {"executor": [], "tokenizer": [], "kernel": []}
    async with system(config) as (client, _, _):
        await fill_journal(client, journaled_tokens)
        for _ in range(repeat):
            for role in found:
                found[role].append(await recover(client, role))
    return {
        **{f"{role}_s": median(values) for role, values in found.items()},
        "journaled_tokens": journaled_tokens,
    }


async def fill_journal(client: AsyncClient, tokens: int) -> None:
    """Commit so many tokens and keep their streams alive, unread: the journal must hold them."""
    committed = (await client.status()).tokens_committed
    while (done := (await client.status()).tokens_committed - committed) < tokens:
        want = min(64, -(-(tokens - done) // 900))
        await asyncio.gather(*(generate(client, prompt_of(8, n), 900) for n in range(want)))


async def recover(client: AsyncClient, role: str) -> float:
    """Seconds from the kill to the first token that was committed after it."""
    stream = await client.generate(
        prompt_of(16, 99), stream=True, max_tokens=900, temperature=0.0, ignore_eos=True
    )
    times: list[float] = []
    enough = asyncio.Event()

    async def read() -> None:
        async for _ in stream:
            times.append(time.perf_counter())
            if len(times) == 20:
                enough.set()

    reading = asyncio.create_task(read())
    await enough.wait()
    row = next(row for row in await client.ps() if row.role == role and row.pid is not None)
    assert row.pid is not None
    killed = time.perf_counter()
    os.kill(row.pid, signal.SIGKILL)
    await reading
    # What was on its way when the process died still arrives; the pause is the longest gap after.
    after = [killed, *(at for at in times if at > killed)]
    gaps = [(b - a, b - killed) for a, b in itertools.pairwise(after)]
    return max(gaps)[1] if gaps else 0.0


# --- against the engine alone ---------------------------------------------------------------------


class Alone:
    """The engine in a process of its own, asked line by line."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @classmethod
    async def start(cls, folder: Path) -> "Alone":
        """Loaded and warm when this returns."""
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "llmservices.executor.alone", str(folder)),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        alone = cls(process)
        await alone._line()
        return alone

    async def ask(self, streams: int, prompt: int, output: int) -> dict[str, float]:
        """One measurement."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{streams} {prompt} {output}\n".encode())
        return await self._line()

    async def stop(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        await self._process.wait()

    async def _line(self) -> dict[str, float]:
        assert self._process.stdout is not None
        line = await self._process.stdout.readline()
        found: dict[str, float] = json.loads(line)
        return found


async def measure_overhead(
    folder: Path, *, streams: int, prompt: int, output: int, pairs: int
) -> Figures:
    """Throughput through the system against the engine alone, and the first token's delay."""
    ratios: list[float] = []
    rates: dict[str, list[float]] = {"system": [], "alone": []}
    delays: list[float] = []
    firsts: dict[str, list[float]] = {"system": [], "alone": []}
    alone = await Alone.start(folder)
    async with system("[gateway]\nport = 0\n") as (client, _, _):
        added = await client.add_model(folder.resolve(), "measured")
        await generate(client, prompt_of(prompt, 0), 4, added.name)
        for pair in range(1, pairs + 1):
            theirs = (await alone.ask(streams, prompt, output))["tokens_s"]
            began = time.perf_counter()
            asks = [
                generate(client, prompt_of(prompt, pair * streams + n), output, added.name)
                for n in range(streams)
            ]
            tokens = sum(count for _, count in await asyncio.gather(*asks))
            ours = tokens / (time.perf_counter() - began)
            rates["system"].append(ours)
            rates["alone"].append(theirs)
            ratios.append(ours / theirs)
        for pair in range(pairs):
            theirs = (await alone.ask(1, prompt, 2))["first_s"]
            ours, _ = await generate(client, prompt_of(prompt, 10_007 * (pair + 1)), 2, added.name)
            firsts["system"].append(ours)
            firsts["alone"].append(theirs)
            delays.append(ours - theirs)
    await alone.stop()
    return {
        "throughput_ratio": median(ratios),
        "throughput_ratio_spread": [round(min(ratios), 3), round(max(ratios), 3)],
        **{f"{name}_tokens_s": median(values) for name, values in rates.items()},
        "added_first_token_ms": round(1000 * median(delays), 2),
        **{f"{name}_first_token_ms": 1000 * median(v) for name, v in firsts.items()},
        "pairs": pairs,
    }
