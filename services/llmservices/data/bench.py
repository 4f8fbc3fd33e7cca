"""`llmos bench data`: tokens a second to one consumer, against datasets + tokenizers + DataLoader.

`python -m llmservices.data.bench` prints one JSON object.  Both sides read the same rows, tokenise
them with the same tokenizer and deliver the same padded batches in random order, each in processes
of its own, in turns.  Cold: nothing is prepared; the first epoch.  Warm: prepared before, by
another process; `--epochs` epochs.
"""

import argparse
import concurrent.futures
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.resources import files
from pathlib import Path
from typing import Final

import numpy as np
from llmproto.data import Prepare
from llmproto.recipes import DataRecipe

from llmservices.data.cache import Cache
from llmservices.data.plans import Maker
from llmservices.data.segments import make_segment
from llmservices.models import embedded_corpus
from llmservices.texts.segments import NOTHING, Batch, SegmentFile, matrix

EMBEDDED: Final = files("llmservices.models")
CONTEXT: Final = 1 << 20
"""Nothing is cut: both sides deliver every token."""


def write_data(path: Path, rows: int) -> None:
    """Paragraphs of the embedded model's corpus, numbered where they come again."""
    documents = embedded_corpus.read()
    paragraphs = [text for each in documents for text in each.text.split("\n\n") if len(text) > 40]
    with path.open("w", encoding="utf-8") as file:
        for row in range(rows):
            turn, place = divmod(row, len(paragraphs))
            text = f"{turn} {paragraphs[place]}" if turn else paragraphs[place]
            file.write(json.dumps({"text": text, "label": row % 2}) + "\n")


def consume(batch: Batch, task: str) -> int:
    """What a trainer makes of a batch: padded ids, mask and labels; gives the tokens."""
    rows = np.arange(batch.rows)
    _, present = batch.padded(rows, padding=0)
    if task == "generate":
        matrix(batch.labels, rows, NOTHING)
    return int(present.sum())


def deliver(arguments: argparse.Namespace) -> dict[str, float]:
    """Our side, once."""
    start = time.perf_counter()
    cache = Cache(Path(arguments.cache), bytes_max=1 << 40)
    cache.open()
    ask = Prepare(
        data=DataRecipe(train=[arguments.data]),
        part="train",
        task=arguments.task,
        tokenizer=arguments.tokenizer,
        context_tokens=CONTEXT,
        batch=arguments.batch,
        seed=0,
    )
    plan, prepared = Maker(cache, set, lambda rows: None).prepare(ask)
    ready = time.perf_counter()
    batches = prepared.batches * arguments.epochs
    tokens = 0
    with concurrent.futures.ThreadPoolExecutor(1) as ahead:  # as the service does

        def begin(index: int) -> "concurrent.futures.Future[Path]":
            return ahead.submit(lambda: make_segment(cache, plan, prepared.plan, index).path)

        coming = begin(0)
        for index in range(-(-batches // prepared.segment_batches)):
            segment = SegmentFile(coming.result())
            coming = begin(index + 1)
            left = batches - index * prepared.segment_batches
            for number in range(min(len(segment), left)):
                tokens += consume(segment.batch(number), arguments.task)
            cache.drop_segments(prepared.plan, below=index)
    ended = time.perf_counter()
    return {"prepare_s": ready - start, "deliver_s": ended - ready, "tokens": tokens}


def _run(module: str, arguments: list[str]) -> dict[str, float]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-P", "-m", module, *arguments],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env=environment,
    )
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def compare(arguments: argparse.Namespace, folder: Path) -> dict[str, object]:
    """Pairs in turns; ratios of each pair, and their median."""
    data = folder / "rows.jsonl"
    if arguments.data:
        data = Path(arguments.data)
    else:
        write_data(data, arguments.rows)
    ours: dict[str, list[float]] = {"cold": [], "warm": []}
    theirs: dict[str, list[float]] = {"cold": [], "warm": []}
    for pair in range(arguments.pairs):
        for name, epochs in (("cold", 1), ("warm", arguments.epochs)):
            common = ["--task", arguments.task, "--batch", str(arguments.batch)]
            common += ["--epochs", str(epochs)]
            cache = folder / f"ours-{pair}"
            cache.mkdir(exist_ok=True)
            places = [str(data), arguments.tokenizer]
            one = ["--one", "--cache", str(cache), "--data", places[0], "--tokenizer", places[1]]
            mine = _run("llmservices.data.bench", [*one, *common])
            reference = [*places, str(folder / f"theirs-{pair}"), *common]
            reference += ["--workers", str(arguments.workers)]
            other = _run("llmservices.models.reference_loader", reference)
            assert mine["tokens"] == other["tokens"], (mine, other)  # the same work
            for figures, kept in ((mine, ours), (other, theirs)):
                kept[name].append(figures["tokens"] / (figures["prepare_s"] + figures["deliver_s"]))
    return {
        name: {
            "tokens_per_s": round(statistics.median(ours[name])),
            "reference_tokens_per_s": round(statistics.median(theirs[name])),
            "ratio": round(statistics.median(_ratios(ours[name], theirs[name])), 2),
            "ratios": [round(ratio, 2) for ratio in _ratios(ours[name], theirs[name])],
        }
        for name in ours
    }


def _ratios(ours: list[float], theirs: list[float]) -> list[float]:
    return [mine / other for mine, other in zip(ours, theirs, strict=True)]


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(prog="llmos bench data")
    parser.add_argument("--task", choices=["generate", "classify"], default="generate")
    parser.add_argument("--data", help="a .jsonl file with text and label; absent: made")
    parser.add_argument("--tokenizer", default=str(EMBEDDED / "embedded"))
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=3, help="of a warm run")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--workers", type=int, default=0, help="of the reference's DataLoader")
    parser.add_argument("--one", action="store_true", help="our side alone, once")
    parser.add_argument("--cache", help="with --one")
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(deliver(arguments)))
        return
    with tempfile.TemporaryDirectory(prefix="llmos-bench-") as folder:
        report = {"arguments": vars(arguments), **compare(arguments, Path(folder))}
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
