"""The loader that `llmos bench data` compares with: `datasets`, a fast tokenizer, DataLoader.

`python -m llmservices.models.reference_loader DATA TOKENIZER CACHE ...` prints one JSON object: the
seconds until all rows of an epoch were delivered, padded, and how many tokens they had.  Run again
with the same cache, the tokenised rows are found there.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import (
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    PreTrainedTokenizerFast,
)

Columns = dict[str, Any]  # whatever the columns hold


def load(arguments: argparse.Namespace) -> PreTrainedTokenizerFast:
    """The tokenizer, with the names that its folder gives to special tokens."""
    folder = Path(arguments.tokenizer)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]  # the library's
        tokenizer_file=str(folder / "tokenizer.json"),
        bos_token=settings.get("bos_token"),
        eos_token=settings.get("eos_token"),
        pad_token=settings.get("pad_token") or settings.get("eos_token"),
    )


def tokenised(arguments: argparse.Namespace, tokenizer: PreTrainedTokenizerFast) -> Any:
    """All rows as token ids; a datasets.Dataset."""
    rows = datasets.load_dataset(
        "json", data_files=arguments.data, split="train", cache_dir=arguments.cache
    )
    end = tokenizer.eos_token_id
    return rows.map(
        _for_text(tokenizer, end) if arguments.task == "generate" else _for_classes(tokenizer),
        batched=True,
        remove_columns=rows.column_names,
    )


def _for_text(tokenizer: PreTrainedTokenizerFast, end: int) -> Callable[[Columns], Columns]:
    def encode(rows: Columns) -> Columns:
        ids = [
            [*row, end] for row in tokenizer(rows["text"], return_attention_mask=False).input_ids
        ]
        return {"input_ids": ids, "labels": ids}

    return encode


def _for_classes(tokenizer: PreTrainedTokenizerFast) -> Callable[[Columns], Columns]:
    def encode(rows: Columns) -> Columns:
        ids = tokenizer(rows["text"], return_attention_mask=False).input_ids
        return {"input_ids": ids, "labels": rows["label"]}

    return encode


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(prog="python -m llmservices.models.reference_loader")
    parser.add_argument("data")
    parser.add_argument("tokenizer")
    parser.add_argument("cache")
    parser.add_argument("--task", choices=["generate", "classify"], default="generate")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=1)
    arguments = parser.parse_args()
    datasets.disable_progress_bars()
    start = time.perf_counter()
    tokenizer = load(arguments)
    rows = tokenised(arguments, tokenizer)
    prepared = time.perf_counter()
    collate = (
        DataCollatorForSeq2Seq(tokenizer)  # pads labels too
        if arguments.task == "generate"
        else DataCollatorWithPadding(tokenizer)
    )
    torch.manual_seed(0)
    loader: Any = torch.utils.data.DataLoader(
        rows,
        batch_size=arguments.batch,
        shuffle=True,
        collate_fn=collate,
        num_workers=arguments.workers,
    )
    tokens = 0
    for _ in range(arguments.epochs):
        for batch in loader:
            tokens += int(batch["attention_mask"].sum())
    ended = time.perf_counter()
    figures = {"prepare_s": prepared - start, "deliver_s": ended - prepared, "tokens": tokens}
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
