"""`llmos bench compare`: this system and its peers, in turn, on one model folder.

    llmos bench compare -- FOLDER --llama-cpp BUILD/bin --gguf MODEL.gguf --vllm ENV/bin/python

Peers that are not there are skipped by name.  Every round measures each peer once in every case;
ratios are taken within a round.
"""

import argparse
import asyncio
import json
import os
import sys
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path

import msgspec
from llmproto.errors import ErrorKind, RemoteError
from rich.console import Console
from rich.table import Table

from libllm.bench.compare.cases import CASES, Case, Result, cases_of, results
from libllm.bench.compare.peers import Driven, LlamaCpp, Ours, Peer, transformers_peer


def parser() -> argparse.ArgumentParser:
    """Every option."""
    found = argparse.ArgumentParser(
        prog="llmos bench compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    found.add_argument("folder", type=Path, help="a model folder (`llmos bench shape` makes one)")
    found.add_argument(
        "--cases", type=cases_of, default=",".join(CASES), help="default: %(default)s"
    )
    found.add_argument("--rounds", type=int, default=3)
    found.add_argument("--dtype", default="bfloat16", help="of vLLM and transformers")
    found.add_argument("--threads", type=int, default=os.cpu_count(), help="of llama.cpp")
    found.add_argument("--config", type=Path, help="config.toml for the system")
    found.add_argument("--llama-cpp", type=Path, help="folder with llama.cpp's programs")
    found.add_argument("--gguf", type=Path, action="append", default=[], help="models for it")
    found.add_argument("--vllm", type=Path, help="interpreter of an environment with vLLM")
    found.add_argument("--vllm-folder", type=Path, action="append", default=[], help="more models")
    found.add_argument("--openvino", type=Path, help="interpreter of one with openvino-genai")
    found.add_argument("--transformers", action="store_true")
    found.add_argument("--json", action="store_true")
    return found


def peers_of(said: argparse.Namespace) -> list[Peer]:
    """Ours first."""
    config = said.config.read_text() if said.config else "[gateway]\nport = 0\n"
    found: list[Peer] = [Ours(said.folder, config)]
    if said.llama_cpp:
        for model in said.gguf:
            name = f"llama.cpp-{model.stem}"
            found.append(LlamaCpp(name, said.llama_cpp, model, said.threads))
    if said.vllm:
        for folder in (said.folder, *said.vllm_folder):
            name = "vllm" if folder is said.folder else f"vllm-{folder.name}"
            found.append(Driven(name, said.vllm, [str(folder), said.dtype], {}))
    if said.openvino:
        for model in said.gguf:
            arguments = [str(model), str(said.folder)]
            found.append(Driven(f"openvino-{model.stem}", said.openvino, arguments, {}))
    if said.transformers:
        found.append(transformers_peer(said.folder, said.dtype))
    return found


async def compare(
    peers: Sequence[Peer], cases: Sequence[Case], rounds: int
) -> tuple[dict[str, str], dict[str, dict[str, Result]]]:
    """Versions by peer, and results by case and peer."""
    async with AsyncExitStack() as stack:
        versions: dict[str, str] = {}
        present: list[Peer] = []
        for peer in peers:
            stack.push_async_callback(peer.stop)
            try:
                versions[peer.name] = await peer.start()
            except RemoteError as error:
                if peer is peers[0] or error.kind is not ErrorKind.UNAVAILABLE:
                    raise
                print(f"skipped: {error.detail}", file=sys.stderr)
                continue
            present.append(peer)
        rates: dict[str, dict[str, list[float]]] = {
            case.name: {peer.name: [] for peer in present} for case in cases
        }
        for salt in range(-1, rounds):  # the first round warms up
            for case in cases:
                for peer in present if salt % 2 else present[::-1]:
                    rate = await peer.rate(case, salt + 2)
                    if salt >= 0:
                        rates[case.name][peer.name].append(rate)
    return versions, {name: results(found, peers[0].name) for name, found in rates.items()}


def show(versions: dict[str, str], found: dict[str, dict[str, Result]]) -> None:
    """For people."""
    table = Table(title="tokens/s, median (lowest-highest); ratio = llmos / peer")
    for head in ("case", "peer", "tokens/s", "ratio"):
        table.add_column(head, justify="left" if head in ("case", "peer") else "right")
    for case, by_peer in found.items():
        for name, one in by_peer.items():
            ratio = (
                ""
                if one.ratio is None
                else f"{one.ratio:.2f} ({one.ratio_low:.2f}-{one.ratio_high:.2f})"
            )
            rate = f"{one.tokens_per_s:.1f} ({one.low:.1f}-{one.high:.1f})"
            table.add_row(case, name, rate, ratio)
        table.add_section()
    Console().print(table)
    for name, version in versions.items():
        print(f"{name}: {version}")


def main() -> None:
    """The command."""
    said = parser().parse_args()
    try:
        versions, found = asyncio.run(compare(peers_of(said), said.cases, said.rounds))
    except RemoteError as error:
        sys.exit(f"llmos bench compare: {error.kind.value}: {error.detail}")
    if said.json:
        print(json.dumps({"versions": versions, "cases": msgspec.to_builtins(found)}, indent=1))
    else:
        show(versions, found)


if __name__ == "__main__":
    main()
