"""sentence-transformers in a process of its own: the other half of `llmos bench embed`.

`python -m llmservices.executor.peer_embed FOLDER` loads the folder and then, for each line of JSON
(a list of texts) on standard input, embeds it in batches of 32 and prints one JSON line: seconds,
and the first numbers of every vector.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from sentence_transformers import SentenceTransformer

SHOWN = 8
"""Numbers of each vector: enough to see that both computed the same."""


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="llmservices.executor.peer_embed", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int)
    said = parser.parse_args()
    if said.threads is not None:
        torch.set_num_threads(said.threads)
    model = SentenceTransformer(str(said.folder), device="cpu")
    print(json.dumps({"threads": torch.get_num_threads()}), flush=True)
    for line in sys.stdin:
        texts = json.loads(line)
        began = time.perf_counter()
        found = model.encode(texts, batch_size=32, show_progress_bar=False)
        seconds = time.perf_counter() - began
        heads = [[float(number) for number in row[:SHOWN]] for row in found]
        print(json.dumps({"seconds": seconds, "heads": heads}), flush=True)


if __name__ == "__main__":
    main()
