"""`llmos bench compare`: this system and its peers, in turn, on one model folder.

    llmos bench compare -- FOLDER --llama-cpp BUILD/bin --gguf MODEL.gguf --vllm ENV/bin/python

Peers that are not there are skipped by name.  Every round measures each peer once in every case
in which a goal compares it (`--every`: in every case); ratios are taken within a round.  The
speed at which memory is read is measured right before and after what is compared with it.
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
from llmproto.errors import ErrorKind, RemoteError, invalid
from rich.console import Console
from rich.table import Table

from libllm.bench.compare import goals
from libllm.bench.compare.cases import CASES, Case, cases_of, results
from libllm.bench.compare.peers import (
    Driven,
    LlamaCpp,
    Ours,
    Peer,
    bits_of_folder,
    bits_of_gguf,
    transformers_peer,
    vllm_environment,
)
from libllm.bench.compare.record import Compared
from libllm.bench.compare.weights import weights_of
from libllm.bench.folders import kv_token_bytes, weight_bytes
from libllm.bench.system import cancel_on_sigterm
from libllm.config import child_environment


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
    found.add_argument(
        "--weights",
        type=weights_of,
        default="auto",
        help="ours: auto, int8, int4, joined by commas; default: %(default)s",
    )
    found.add_argument("--every", action="store_true", help="every peer in every case")
    found.add_argument("--llama-cpp", type=Path, help="folder with llama.cpp's programs")
    found.add_argument("--gguf", type=Path, action="append", default=[], help="models for it")
    found.add_argument("--vllm", type=Path, help="interpreter of an environment with vLLM")
    found.add_argument("--vllm-folder", type=Path, action="append", default=[], help="more models")
    found.add_argument(
        "--vllm-preload", default="", help="libraries: tcmalloc and iomp5, by colons"
    )
    found.add_argument("--openvino", type=Path, help="interpreter of one with openvino-genai")
    found.add_argument("--transformers", action="store_true")
    found.add_argument("--json", action="store_true", help="a record for `llmos bench goals`")
    return found


def peers_of(said: argparse.Namespace) -> list[Peer]:
    """Ours first."""
    config = said.config.read_text() if said.config else "[gateway]\nport = 0\n"
    own = bits_of_folder(said.folder, "auto")
    found: list[Peer] = [Ours(said.folder, config, one, own_bits=own) for one in said.weights]
    if said.llama_cpp:
        for model in said.gguf:
            name = f"llama.cpp-{model.stem}"
            found.append(LlamaCpp(name, said.llama_cpp, model, said.threads))
    if said.vllm:
        environment = vllm_environment(said.vllm_preload, f"0-{(os.cpu_count() or 1) - 1}")
        for folder in (said.folder, *said.vllm_folder):
            name = "vllm" if folder is said.folder else f"vllm-{folder.name}"
            arguments = [str(folder), said.dtype]
            bits = bits_of_folder(folder, said.dtype)
            found.append(Driven(name, said.vllm, arguments, environment, bits=bits))
    if said.openvino:
        for model in said.gguf:
            arguments = [str(model), str(said.folder)]
            bits = bits_of_gguf(model)
            name = f"openvino-{model.stem}"
            found.append(Driven(name, said.openvino, arguments, {}, bits=bits))
    if said.transformers:
        found.append(transformers_peer(said.folder, said.dtype))
    return found


async def compare(
    peers: Sequence[Peer], cases: Sequence[Case], rounds: int, folder: Path, *, every: bool
) -> Compared:
    """All that was measured; peers that are not there, or end, are named on stderr."""
    cancel_on_sigterm()
    async with AsyncExitStack() as stack:
        versions: dict[str, str] = {}
        present: list[Peer] = []
        for peer in peers:
            stack.push_async_callback(peer.stop)
            try:
                versions[peer.name] = await peer.start()
            except RemoteError as error:
                if isinstance(peer, Ours) or error.kind is not ErrorKind.UNAVAILABLE:
                    raise
                print(f"skipped: {error.detail}", file=sys.stderr)
                continue
            print(f"started: {peer.name} {versions[peer.name]}", file=sys.stderr)
            present.append(peer)
        measured = {
            case.name: [one for one in present if every or _compares(case, one)] for case in cases
        }
        rates: dict[str, dict[str, list[float]]] = {
            name: {peer.name: [] for peer in chosen} for name, chosen in measured.items()
        }
        for case in cases:
            for peer in measured[case.name]:
                await peer.warm(case)
        most = max(cases, key=lambda case: case.streams)
        resident: dict[str, int] = {}
        computed: dict[str, int] = {}
        reads: list[float] = []
        for salt in range(rounds):
            for case in cases:
                chosen = measured[case.name]
                for peer in list(chosen if salt % 2 else chosen[::-1]):
                    gauged = case.name == goals.GAUGED_CASE and peer.name == goals.GAUGED_PEER
                    before = await _read_bandwidth() if gauged else 0.0
                    rate = await _rate(peer, case, salt + 1)
                    if gauged:
                        reads.append((before + await _read_bandwidth()) / 2)
                    if rate is None:  # a list with a gap would pair what is no pair
                        chosen.remove(peer)
                        del rates[case.name][peer.name]
                        continue
                    rates[case.name][peer.name].append(rate)
                    if case is most and isinstance(peer, Ours) and peer.name not in resident:
                        resident[peer.name] = await peer.resident_bytes()
                        computed[peer.name] = peer.tokens
        ours = [peer for peer in present if isinstance(peer, Ours)]
        return Compared(
            bits={peer.name: peer.bits for peer in present},
            versions=versions,
            ours=[peer.name for peer in ours],
            tokens_per_s=rates,
            weight_bytes=weight_bytes(folder),
            read_bytes_per_s=reads,
            first_token_s={peer.name: peer.first_token_s for peer in ours},
            resident_bytes=resident,
            kv_bytes=computed.get(goals.GAUGED_PEER, 0) * kv_token_bytes(folder),
        )


async def _rate(peer: Peer, case: Case, salt: int) -> float | None:
    """None, said on stderr, where a peer failed."""
    try:
        rate = await peer.rate(case, salt)
    except RemoteError as error:
        if isinstance(peer, Ours) or error.kind is not ErrorKind.UNAVAILABLE:
            raise
        print(f"skipped in {case.name}: {error.detail}", file=sys.stderr)
        return None
    print(f"{case.name} {salt}: {peer.name} {rate:.1f} tokens/s", file=sys.stderr)
    return rate


def _compares(case: Case, peer: Peer) -> bool:
    return goals.wanted(case.name, peer.name, peer.bits, ours=isinstance(peer, Ours))


async def _read_bandwidth() -> float:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "libllm.bench.bandwidth"),
        stdout=asyncio.subprocess.PIPE,
        env=child_environment(),
    )
    output, _ = await process.communicate()
    return float(output)


def show(found: Compared) -> None:
    """For people."""
    table = Table(title="tokens/s, median (lowest-highest); ratio = ours / peer, by round")
    heads = ("case", "peer", "tokens/s", *(f"{name} over it" for name in found.ours))
    for head in heads:
        table.add_column(head, justify="left" if head in ("case", "peer") else "right")
    for case, rates in found.tokens_per_s.items():
        mine = {name: results(rates, name) for name in found.ours if rates.get(name)}
        for name in rates:
            one = results(rates, name)[name]
            ratios = [
                f"{of.ratio:.2f} ({of.ratio_low:.2f}-{of.ratio_high:.2f})"
                if ours in mine and (of := mine[ours][name]).ratio is not None
                else ""
                for ours in found.ours
            ]
            rate = f"{one.tokens_per_s:.1f} ({one.low:.1f}-{one.high:.1f})"
            table.add_row(case, name, rate, *ratios)
        table.add_section()
    Console().print(table)
    for name, version in found.versions.items():
        print(f"{name}: {version}")
    Console().print(goals.table(goals.lines([found])))


def main() -> None:
    """The command."""
    said = parser().parse_args()
    try:
        if said.rounds < 1:
            raise invalid(f"--rounds {said.rounds}: at least 1")
        found = asyncio.run(
            compare(peers_of(said), said.cases, said.rounds, said.folder, every=said.every)
        )
    except RemoteError as error:
        sys.exit(f"llmos bench compare: {error.kind.value}: {error.detail}")
    if said.json:
        print(json.dumps(msgspec.to_builtins(found), indent=1))
    else:
        show(found)


if __name__ == "__main__":
    main()
