"""The engine of an executor without the system: the other half of every comparison with it.

`python -m llmservices.executor.alone FOLDER` loads the model just as the executor does and then,
for each line `STREAMS PROMPT OUTPUT` on standard input, computes so many threads and prints one
JSON line: seconds to the first token, and output tokens a second over all.
"""

import argparse
import json
import random
import sys
import time
from pathlib import Path

from libllm.config import ExecutorConfig
from llmproto.generation import Sampling

from llmservices.executor.contract import Admission
from llmservices.executor.core import Engine
from llmservices.executor.loader import Settings, load_engine


def measure(
    engine: Engine, *, streams: int, prompt: int, output: int, salt: int
) -> dict[str, float]:
    """All threads at once, from their arrival to the last token."""
    chance = random.Random(salt)
    began = time.perf_counter()
    for number in range(streams):
        engine.add(
            Admission(
                thread=number.to_bytes(8),
                residency=number + 1,
                tokens=[chance.randrange(256) for _ in range(prompt)],
                prompt_tokens=prompt,
                output_tokens_max=output,
                sampling=Sampling(temperature=0.0, ignore_eos=True),
                domain=bytes(16),
            )
        )
    first = 0.0
    ended = 0
    while ended < streams:
        result = engine.step()
        assert not result.failed, result.failed
        if result.rows and not first:
            first = time.perf_counter() - began
        for row in result.rows:
            engine.watermark(row.residency, row.position)
            if row.end:
                engine.drop(row.residency)
                ended += 1
    return {"first_s": first, "tokens_s": streams * output / (time.perf_counter() - began)}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="llmservices.executor.alone", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--weights", choices=("auto", "int8", "int4"), default="auto")
    parser.add_argument("--step", choices=("auto", "torch"), default="auto")
    parser.add_argument("--mode", choices=("fast", "exact"), default="fast")
    said = parser.parse_args()
    config = ExecutorConfig(
        mode=said.mode, threads=said.threads, weights=said.weights, step=said.step
    )
    settings = Settings(
        model="alone",
        path=said.folder,
        digest=bytes(16),
        device="cpu",
        cores=list(range(said.threads)),
        config=config,
    )
    engine = load_engine(settings, lambda plan: None)
    if not isinstance(engine, Engine):
        parser.error(f"{said.folder} generates no text")
    print(json.dumps({"path": engine.path}), flush=True)
    for salt, line in enumerate(sys.stdin):
        streams, prompt, output = map(int, line.split())
        found = measure(engine, streams=streams, prompt=prompt, output=output, salt=salt)
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
