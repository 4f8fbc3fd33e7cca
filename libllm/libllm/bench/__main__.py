"""`python -m libllm.bench MEASURE`: measures this machine's system and prints JSON."""

import argparse
import asyncio
import json
from pathlib import Path

from libllm.bench.beside import measure_beside
from libllm.bench.rollback import measure_rollback
from libllm.bench.system import (
    measure_boot,
    measure_cpu,
    measure_overhead,
    measure_recovery,
)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="libllm.bench", description=__doc__)
    parser.add_argument(
        "measure", choices=("boot", "cpu", "recovery", "overhead", "rollback", "beside")
    )
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--output", type=int, default=128)
    parser.add_argument("--journaled-tokens", type=int, default=1_000_000)
    parser.add_argument("--swaps", type=int, default=10, help="of beside")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each part of beside")
    parser.add_argument("--folder", type=Path, help="model folder, for overhead")
    said = parser.parse_args()
    match said.measure:
        case "boot":
            measured = measure_boot(said.repeat)
        case "cpu":
            measured = measure_cpu(said.streams, said.output, said.repeat)
        case "recovery":
            measured = measure_recovery(said.repeat, said.journaled_tokens)
        case "beside":
            measured = measure_beside(said.streams, said.swaps, said.seconds)
        case "rollback":
            measured = measure_rollback(said.repeat)
        case _:
            if said.folder is None:
                parser.error("overhead needs --folder")
            measured = measure_overhead(
                said.folder,
                streams=said.streams,
                prompt=said.prompt,
                output=said.output,
                pairs=said.repeat,
            )
    print(json.dumps({said.measure: asyncio.run(measured)}, indent=1))


if __name__ == "__main__":
    main()
