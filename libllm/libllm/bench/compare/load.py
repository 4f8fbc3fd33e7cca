"""`llmos bench load`: this system and vLLM's server in turn under one recorded trace.

    llmos bench load -- FOLDER --azure AzureLLMInferenceTrace_conv.csv --vllm ENV/bin/python

The trace is replayed faster and slower, each time for so long, over HTTP.  What counts are the
requests that kept both limits, for each second in which requests were sent.
"""

import argparse
import asyncio
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec
from llmproto.errors import RemoteError, invalid
from rich.console import Console
from rich.table import Table

from libllm.bench.compare import goals
from libllm.bench.compare.peers import NAME, vllm_environment
from libllm.bench.compare.record import Loaded, Mixed
from libllm.bench.compare.served import OursServed, Served, VllmServed
from libllm.bench.compare.weights import weights_of
from libllm.bench.serve.run import run_load
from libllm.bench.serve.servers import Target
from libllm.bench.serve.timeline import SERVER, Limits
from libllm.bench.serve.workload import Ask, Lengths, Shape, azure, synthetic
from libllm.bench.system import cancel_on_sigterm

WARM_UP: Final = 4


def parser() -> argparse.ArgumentParser:
    """Every option."""
    found = argparse.ArgumentParser(
        prog="llmos bench load",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    found.add_argument("folder", type=Path, help="a model folder")
    found.add_argument("--azure", type=Path, required=True, help="the trace (CSV)")
    found.add_argument(
        "--speeds", type=speeds_of, default="0.5,0.75,1", help="of the trace; default: %(default)s"
    )
    found.add_argument("--seconds", type=float, default=60.0, help="of each speed")
    found.add_argument("--prompt-max", type=int, default=1024)
    found.add_argument("--output-max", type=int)
    found.add_argument("--vocabulary", type=int, default=2000, help="token ids are below this")
    found.add_argument("--weights", type=weights_of, default="auto", help="ours, by commas")
    found.add_argument("--config", type=Path, help="config.toml for the system")
    found.add_argument("--vllm", type=Path, help="interpreter of an environment with vLLM")
    found.add_argument(
        "--vllm-folder", type=Path, action="append", help="its models; default: the folder"
    )
    found.add_argument(
        "--vllm-preload", default="", help="libraries: tcmalloc and iomp5, by colons"
    )
    found.add_argument(
        "--vllm-argument", action="append", default=[], help="one more for its server, after ="
    )
    found.add_argument("--dtype", default="bfloat16", help="of vLLM")
    found.add_argument("--json", action="store_true", help="a record for `llmos bench goals`")
    return found


def speeds_of(text: str) -> list[float]:
    """Numbers above 0, joined by commas."""
    try:
        found = [float(one) for one in text.split(",")]
    except ValueError:
        found = [0.0]
    if min(found) <= 0:
        raise argparse.ArgumentTypeError(f"{text!r}: numbers above 0, joined by commas")
    return found


def servers_of(said: argparse.Namespace) -> list[Served]:
    """Theirs first: it is them whose best speed is looked for."""
    found: list[Served] = []
    if said.vllm:
        environment = vllm_environment(said.vllm_preload, f"0-{(os.cpu_count() or 1) - 1}")
        for folder in said.vllm_folder or [said.folder]:
            name = "vllm" if folder == said.folder else f"vllm-{folder.name}"
            arguments = ["--model", str(folder), "--dtype", said.dtype, *said.vllm_argument]
            found.append(VllmServed(name, said.vllm, arguments, environment))
    config = said.config.read_text() if said.config else "[gateway]\nport = 0\n"
    return found + [OursServed(said.folder, config, one) for one in said.weights]


def give_up_s(asks: Sequence[Ask], limits: Limits) -> float:
    """When the last request is over that can still keep the limits."""
    last_ms = [
        1000 * (ask.at_s or 0.0) + limits.ttft_ms + limits.tpot_ms * (ask.output_tokens - 1)
        for ask in asks
    ]
    return max(last_ms) / 1000 + 1.0


async def load(
    servers: Sequence[Served], loads: dict[float, list[Ask]], seconds: float, vocabulary: int
) -> list[Loaded]:
    """Every server under every load; those that are not there are named on stderr."""
    cancel_on_sigterm()
    found: list[Loaded] = []
    warm_up = synthetic(WARM_UP, Shape(vocabulary, 1), prompt=Lengths(64, 64), output=Lengths(8, 8))
    for server in servers:
        try:
            url = await server.start()
            for speed, asks in loads.items():
                summary, lines = await run_load(
                    Target("http", url=url, model=NAME),
                    asks,
                    concurrency=None,
                    warm_up=warm_up,
                    limits=[SERVER],
                    give_up_s=give_up_s(asks, SERVER),
                )
                kept = sum(SERVER.kept(one) for one in lines if not one.error)
                found.append(
                    Loaded(
                        server.name,
                        server.ours,
                        speed,
                        kept_per_s=round(kept / seconds, 4),
                        sent_per_s=round(len(asks) / seconds, 4),
                        summary=summary,
                    )
                )
                print(
                    f"{server.name} at {speed:g} x: {kept} of {len(asks)} kept both limits, "
                    f"{summary.failed} failed {summary.errors or ''}",
                    file=sys.stderr,
                )
        except RemoteError as error:
            if server.ours:
                raise
            print(f"skipped: {error.detail}", file=sys.stderr)
        finally:
            await server.stop()
    return found


def loads_of(said: argparse.Namespace) -> dict[float, list[Ask]]:
    """By speed: what arrives within the time."""
    shape = Shape(said.vocabulary, 0, said.prompt_max, said.output_max)
    found = {}
    for speed in said.speeds:
        rows = azure(said.azure, sys.maxsize, shape, speed=speed, until_s=said.seconds)
        if not rows:
            raise invalid(f"{said.azure}: no row within {said.seconds} s at {speed:g} x")
        found[speed] = rows
    return found


def show(runs: Sequence[Loaded]) -> None:
    """For people."""
    table = Table(title="requests/s that kept TTFT 2000 ms and TPOT 100 ms")
    for head in ("server", "speed", "sent/s", "kept/s", "share", "TTFT p50/p99", "TPOT p50/p99"):
        table.add_column(head, justify="left" if head == "server" else "right")
    for run in runs:
        first, each = run.summary.ttft_ms, run.summary.tpot_ms
        table.add_row(
            run.server,
            f"{run.speed:g}",
            f"{run.sent_per_s:.3f}",
            f"{run.kept_per_s:.3f}",
            f"{100 * run.kept_per_s / run.sent_per_s:.0f} %",
            "-" if first is None else f"{first.p50:.0f}/{first.p99:.0f}",
            "-" if each is None else f"{each.p50:.0f}/{each.p99:.0f}",
        )
    Console().print(table)
    Console().print(goals.table(goals.lines([Mixed(list(runs))])))


def main() -> None:
    """The command."""
    said = parser().parse_args()
    try:
        runs = asyncio.run(load(servers_of(said), loads_of(said), said.seconds, said.vocabulary))
    except RemoteError as error:
        sys.exit(f"llmos bench load: {error.kind.value}: {error.detail}")
    if said.json:
        print(json.dumps(msgspec.to_builtins(Mixed(runs)), indent=1))
    else:
        show(runs)


if __name__ == "__main__":
    main()
