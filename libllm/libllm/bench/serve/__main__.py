"""`llmos bench serve`: puts a load on a server of language models and says how it bore it.

llmos bench serve -- --url http://127.0.0.1:8000 --concurrency 32 --requests 200
llmos bench serve -- --system --rate 4 --prompt 64:512 --output 128
llmos bench serve -- --url ... --azure AzureLLMInferenceTrace_conv.csv --speed 2 --requests 300
"""

import argparse
import asyncio
import importlib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
from llmproto.errors import RemoteError, invalid
from rich.console import Console

from libllm.bench.serve import report
from libllm.bench.serve.run import run_load
from libllm.bench.serve.servers import Target
from libllm.bench.serve.timeline import INTERACTIVE, SERVER, Limits, Timeline
from libllm.bench.serve.workload import (
    MOONCAKE_BLOCK_TOKENS,
    Ask,
    Lengths,
    Shape,
    azure,
    mooncake,
    reusable_tokens,
    synthetic,
)


def parser() -> argparse.ArgumentParser:
    """Every option."""
    found = argparse.ArgumentParser(
        prog="llmos bench serve",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    whom = found.add_argument_group("whom to ask").add_mutually_exclusive_group(required=True)
    whom.add_argument("--url", help="base URL of an OpenAI-compatible server")
    whom.add_argument("--system", action="store_true", help="a system of this machine, by libllm")
    found.add_argument("--home", default="", help="of the system")
    found.add_argument("--model", help="default: the server's first, the system's default")
    found.add_argument("--key", default="", help="API key")
    found.add_argument("--api", choices=("completions", "chat"), default="completions")
    found.add_argument("--text", action="store_true", help="send words instead of token ids")
    load = found.add_argument_group("what to ask")
    load.add_argument("--requests", type=int, default=100)
    load.add_argument("--prompt", type=Lengths.read, default="128", help="tokens: N or LOW:HIGH")
    load.add_argument("--output", type=Lengths.read, default="128", help="tokens: N or LOW:HIGH")
    load.add_argument("--vocabulary", type=int, default=2000, help="token ids are below this")
    load.add_argument("--seed", type=int, default=0)
    load.add_argument("--azure", type=Path, help="replay this trace (CSV)")
    load.add_argument("--mooncake", type=Path, help="replay this trace (JSON lines)")
    load.add_argument("--block", type=int, default=MOONCAKE_BLOCK_TOKENS, help="tokens a hash id")
    load.add_argument("--speed", type=float, default=1.0, help="of a trace: 2 is twice as fast")
    load.add_argument("--prompt-max", type=int, help="cut a trace's prompts to this")
    load.add_argument("--output-max", type=int, help="cut a trace's answers to this")
    when = found.add_argument_group("when to ask").add_mutually_exclusive_group()
    when.add_argument("--concurrency", type=int, help="closed loop: so many at once (default 8)")
    when.add_argument("--rate", type=float, help="open loop: Poisson, requests a second")
    found.add_argument("--warm-up", type=int, default=2, help="requests before, not counted")
    found.add_argument("--processes", type=int, help="default: as many as the load needs")
    found.add_argument(
        "--limits",
        action="append",
        default=[],
        metavar="NAME=TTFT/TPOT",
        help="of goodput, in ms; default server=2000/100 and interactive=500/30",
    )
    found.add_argument("--json", action="store_true")
    found.add_argument("--timelines", type=Path, help="write every request as JSON lines")
    found.add_argument("--plot", type=Path, help="draw it (PNG, SVG, PDF)")
    return found


def asks_of(said: argparse.Namespace) -> tuple[list[Ask], int | None]:
    """The workload and, of a closed loop, how many at once."""
    shape = Shape(said.vocabulary, said.seed, said.prompt_max, said.output_max)
    if said.azure is not None:
        asks = azure(said.azure, said.requests, shape, speed=said.speed)
    elif said.mooncake is not None:
        asks = mooncake(
            said.mooncake, said.requests, shape, speed=said.speed, block_tokens=said.block
        )
    else:
        asks = synthetic(
            said.requests, shape, prompt=said.prompt, output=said.output, rate=said.rate
        )
        return asks, None if said.rate is not None else said.concurrency or 8
    return asks, said.concurrency


def limits_of(texts: Sequence[str]) -> list[Limits]:
    """NAME=TTFT/TPOT, each."""
    found = []
    for text in texts:
        name, _, numbers = text.partition("=")
        first, _, each = numbers.partition("/")
        try:
            found.append(Limits(name, float(first), float(each)))
        except ValueError:
            raise invalid(f"limits are NAME=TTFT/TPOT in ms, not {text!r}") from None
    return found or [SERVER, INTERACTIVE]


async def measure(said: argparse.Namespace) -> None:
    """The run."""
    asks, concurrency = asks_of(said)
    if not asks:
        raise invalid("nothing is to be asked: --requests, or the trace, is empty")
    shape = Shape(said.vocabulary, said.seed + 1)
    warm_up = synthetic(
        said.warm_up, shape, prompt=Lengths(16, 16), output=Lengths(4, 4), rate=None
    )
    target = Target(
        "system" if said.system else "http",
        url=said.url or "",
        home=said.home,
        model=said.model,
        api=said.api,
        text=said.text,
        key=said.key,
    )
    summary, lines = await run_load(
        target,
        asks,
        concurrency=concurrency,
        warm_up=warm_up,
        processes=said.processes,
        limits=limits_of(said.limits),
    )
    if said.timelines is not None:
        said.timelines.write_bytes(msgspec.json.Encoder().encode_lines(lines))
    if said.plot is not None:
        _draw(lines, said.plot)
    if said.json:
        print(json.dumps(msgspec.to_builtins(summary), indent=1))
    else:
        print(report.rates(summary))
        Console().print(report.table(summary))
        print(report.goodput(summary))
        if said.mooncake is not None:
            print(f"reusable prompt tokens: {reusable_tokens(asks, said.block)}")


def _draw(lines: list[Timeline], path: Path) -> None:
    try:
        draw: Callable[[list[Timeline], Path], None] = importlib.import_module(
            "libllm.bench.serve.plot"
        ).plot
    except ModuleNotFoundError as error:
        raise invalid(f"plots need {error.name}: pip install {error.name}") from None
    draw(lines, path)


def main() -> None:
    """The command."""
    said = parser().parse_args()
    try:
        asyncio.run(measure(said))
    except RemoteError as error:
        sys.exit(f"llmos bench serve: {error.kind.value}: {error.detail}")


if __name__ == "__main__":
    main()
