"""How a driver is asked: one JSON object a line, one answer a line.

`{"streams": 8, "prompt": 128, "output": 128, "salt": "3"}` is answered by `{"seconds": 1.25}`: how
long the engine took to compute all of it.  The first line, unasked, is `{"name": ..., "version":
...}` once the model is loaded.
"""

import json
import random
import sys
import time
from collections.abc import Callable, Sequence

Prompts = Sequence[list[int]]
Compute = Callable[[Prompts, int], None]
"""Continues every prompt by so many tokens, greedily, whatever they are."""
FIRST_ID = 16


def serve(name: str, version: str, compute: Compute, *, vocabulary: int) -> None:
    """Answer until stdin ends.  Stdout carries answers alone: engines that print get stderr."""
    answers, sys.stdout = sys.stdout, sys.stderr
    print(json.dumps({"name": name, "version": version}), file=answers, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        chance = random.Random(asked["salt"])
        prompts = [
            chance.choices(range(FIRST_ID, vocabulary), k=asked["prompt"])
            for _ in range(asked["streams"])
        ]
        began = time.perf_counter()
        compute(prompts, asked["output"])
        seconds = time.perf_counter() - began
        print(json.dumps({"seconds": seconds}), file=answers, flush=True)


def vocabulary_of(folder: str) -> int:
    """What config.json says."""
    with open(f"{folder}/config.json", encoding="utf-8") as file:
        return int(json.load(file)["vocab_size"])
