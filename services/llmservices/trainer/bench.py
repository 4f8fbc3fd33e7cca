"""Measures training on this machine: `python -m llmservices.trainer.bench WHAT`; prints JSON.

minilm, llama  tokens a second against transformers.Trainer: an encoder of a folder on sentences
               with labels, and a Llama of 10 million parameters; same rows, same precision.
nano           a step of nanoGPT's CPU setting against nanoGPT's own model and optimiser, from a
               checkout of it (--nanogpt FOLDER); the text is --data.
system         tokens a second of a job in a whole system against its step function in a bare loop.
stall          how long a checkpoint keeps training waiting, against one copy of the same bytes.

Both sides take turns in one process; the figure is the median over the steps, the ratio that of
the medians of each pair of turns.
"""

import argparse
import asyncio
import importlib.util
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import torch
from llmproto.recipes import Recipe, TrainingRecipe
from tokenizers import Tokenizer
from transformers import (
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from llmservices.trainer import bench_system, building
from llmservices.trainer.architectures import own
from llmservices.trainer.batches import Batch, Row
from llmservices.trainer.core import Training
from llmservices.trainer.gpt2 import Gpt2, Gpt2Spec
from llmservices.trainer.learner import Learner
from llmservices.trainer.linears import accelerate
from llmservices.trainer.savebuffer import SaveBuffer, bytes_of, folder_for
from llmservices.trainer.state import Losses, checkpoint_tensors

TURN_STEPS: Final = 4
PADDING: Final = 0
Turn = Callable[[list[Batch]], list[float]]
"""Steps over these batches; seconds of each."""


class _Clock(TrainerCallback):
    """Seconds of each step of transformers.Trainer, its loading of data included."""

    def __init__(self) -> None:
        self.marks: list[float] = []
        self.losses: list[float] = []

    def on_train_begin(self, *_: Any, **__: Any) -> None:  # Any: the library's own signature
        self.marks = [time.perf_counter()]

    def on_step_end(self, *_: Any, **__: Any) -> None:  # Any: the library's own signature
        self.marks.append(time.perf_counter())

    def on_log(self, *_: Any, logs: Any = None, **__: Any) -> None:  # Any: as above
        if logs and "loss" in logs:
            self.losses.append(float(logs["loss"]))


def _collate(rows: list[Row]) -> dict[str, torch.Tensor]:
    """Padded to the longest of the batch, as DataCollatorWithPadding does it."""
    longest = max(len(row.ids) for row in rows)
    ids = torch.full((len(rows), longest), PADDING)
    mask = torch.zeros_like(ids)
    labels = []
    for index, row in enumerate(rows):
        ids[index, : len(row.ids)] = row.ids
        mask[index, : len(row.ids)] = 1
        assert row.labels is not None
        if len(row.labels) == 1:
            labels.append(row.labels)
        else:  # theirs are shifted by the model: the label of a token is the token
            labels.append(row.ids)
    shape = (len(rows), -1) if len(labels[0]) > 1 else (-1,)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": torch.cat(labels).view(shape),
    }


def _trainer(model: Any, batches: list[Batch], rate: float, clock: _Clock, folder: str) -> Any:
    # Any: the library's model and its trainer
    rows = [row for each in batches for row in each.rows]
    arguments = TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=len(batches[0].rows),
        max_steps=len(batches),
        learning_rate=rate,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        use_cpu=True,
        remove_unused_columns=False,
        train_sampling_strategy="sequential",
    )
    made: Any = Trainer
    return made(
        model=model,
        args=arguments,
        train_dataset=rows,
        data_collator=_collate,
        callbacks=[clock],
    )


def trainer_losses(model: Any, batches: list[Batch], rate: float) -> list[float]:
    """What transformers.Trainer logs of each step.  `model` is the library's."""
    clock = _Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer(model, batches, rate, clock, folder)
        trainer.train()
        return clock.losses


def trainer_turn(model: Any, rate: float) -> Turn:
    """transformers.Trainer over the rows in their order.  `model` is the library's."""

    def turn(batches: list[Batch]) -> list[float]:
        clock = _Clock()
        with tempfile.TemporaryDirectory() as folder:
            _trainer(model, batches, rate, clock, folder).train()
        return [after - before for before, after in zip(clock.marks, clock.marks[1:])]

    return turn


def our_turn(learner: Learner, recipe: TrainingRecipe) -> Turn:
    """The trainer's step."""
    accelerate(learner)
    training = Training(learner, recipe, steps_total=1 << 30)

    def turn(batches: list[Batch]) -> list[float]:
        seconds = []
        for batch in batches:
            began = time.perf_counter()
            training.step(batch)
            seconds.append(time.perf_counter() - began)
        return seconds

    return turn


def compare(batches: Iterator[Batch], ours: Turn, theirs: Turn, *, pairs: int) -> dict[str, float]:
    """Turn by turn, on the same batches; the first pair is not counted."""
    ratios: list[float] = []
    figures: dict[str, list[float]] = {"ours": [], "theirs": []}
    for pair in range(pairs + 1):
        taken = [next(batches) for _ in range(TURN_STEPS)]
        tokens = [batch.tokens for batch in taken]
        mine, other = ours(taken), theirs(taken)
        if not pair:
            continue
        ratios.append(sum(other) / sum(mine))
        figures["ours"].append(sum(tokens) / sum(mine))
        figures["theirs"].append(sum(tokens) / sum(other))
    return {
        "tokens_s": round(statistics.median(figures["ours"]), 1),
        "tokens_s_theirs": round(statistics.median(figures["theirs"]), 1),
        "ratio": round(statistics.median(ratios), 3),
        "ratio_least": round(min(ratios), 3),
        "ratio_most": round(max(ratios), 3),
    }


def sentences(data: Path, tokenizer: Path, batch: int) -> Iterator[Batch]:
    """Labelled sentences of a tsv file, in its order, for ever."""
    encode = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    encode.no_padding()
    encode.no_truncation()
    lines = [line.rsplit("\t", 1) for line in data.read_text().splitlines()]
    rows = [
        Row(torch.tensor(encode.encode(text).ids), torch.tensor([int(label)]))
        for text, label in lines
    ]
    while True:
        for first in range(0, len(rows) - batch + 1, batch):
            yield Batch(rows[first : first + batch], "classify")


def minilm(arguments: argparse.Namespace) -> dict[str, float]:
    """The encoder of --folder on --data."""
    recipe = Recipe("bench", task="classify", base=str(arguments.folder))
    built = building.build(
        recipe, building.Base.read(arguments.folder), None, ["negative", "positive"]
    )
    library: Any = AutoModelForSequenceClassification  # Any: the library's loaders have no types
    theirs = library.from_pretrained(arguments.folder, num_labels=2)
    batches = sentences(arguments.data, arguments.folder, arguments.batch)
    return compare(
        batches,
        our_turn(built.learner, recipe.training),
        trainer_turn(theirs, recipe.training.learning_rate),
        pairs=arguments.pairs,
    )


def random_rows(vocabulary: int, batch: int, tokens: int) -> Iterator[Batch]:
    """Rows of random tokens."""
    generator = torch.Generator().manual_seed(0)
    while True:
        whole = torch.randint(0, vocabulary, (batch, tokens + 1), generator=generator)
        yield Batch([Row(row[:-1], row[1:]) for row in whole], "generate")


def llama(arguments: argparse.Namespace) -> dict[str, float]:
    """10 million parameters, 4 rows of 256 tokens."""
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=320,
        intermediate_size=864,
        num_hidden_layers=7,
        num_attention_heads=10,
        num_key_value_heads=10,
        max_position_embeddings=256,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    theirs = LlamaForCausalLM(config)
    learner = own(config.to_dict(), labels=0)
    assert learner is not None
    learner.load_exported(dict(theirs.named_parameters()))
    recipe = TrainingRecipe(batch=4, learning_rate=1e-4)
    found = compare(
        random_rows(config.vocab_size, 4, 256),
        our_turn(learner, recipe),
        trainer_turn(theirs, recipe.learning_rate),
        pairs=arguments.pairs,
    )
    return found | {"parameters": sum(each.numel() for each in learner.parameters())}


def nanogpt_module(folder: Path) -> Any:  # Any: somebody else's module
    """model.py of a checkout."""
    found = importlib.util.spec_from_file_location("nanogpt_model", folder / "model.py")
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules[found.name] = module
    found.loader.exec_module(module)
    return module


def nano(arguments: argparse.Namespace) -> dict[str, float]:
    """Characters, 4 layers, 4 heads, width 128, 12 rows of 64 tokens."""
    text = arguments.data.read_text()
    place = {character: index for index, character in enumerate(sorted(set(text)))}
    ids = torch.tensor([place[character] for character in text])
    generator = torch.Generator().manual_seed(0)
    module = nanogpt_module(arguments.nanogpt)
    torch.manual_seed(0)
    config = module.GPTConfig(
        block_size=64,
        vocab_size=len(place),
        n_layer=4,
        n_head=4,
        n_embd=128,
        dropout=0.0,
        bias=False,
    )
    theirs = module.GPT(config)
    optimizer = theirs.configure_optimizers(0.1, 1e-3, (0.9, 0.99), "cpu")
    learner = Gpt2(Gpt2Spec(len(place), 128, 512, 4, 4, 64, bias=False))
    learner.initialise()
    recipe = TrainingRecipe(learning_rate=1e-3, beta2=0.99, weight_decay=0.1)

    def windows() -> Iterator[Batch]:
        while True:
            starts = torch.randint(len(ids) - 64, (12,), generator=generator).tolist()
            yield Batch(
                [Row(ids[at : at + 64], ids[at + 1 : at + 65]) for at in starts], "generate"
            )

    def their_turn(batches: list[Batch]) -> list[float]:
        seconds = []
        for batch in batches:
            began = time.perf_counter()
            x = torch.stack([row.ids for row in batch.rows])
            y = torch.stack([row.labels for row in batch.rows if row.labels is not None])
            _, loss = theirs(x, y)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            loss.item()
            seconds.append(time.perf_counter() - began)
        return seconds

    return compare(windows(), our_turn(learner, recipe), their_turn, pairs=arguments.pairs)


def stall(arguments: argparse.Namespace) -> dict[str, float]:
    """A model of 17 million parameters with its optimiser: 200 MB."""
    learner = Gpt2(Gpt2Spec(8192, 512, 2048, 4, 8, 64))
    learner.initialise()
    accelerate(learner)
    training = Training(learner, TrainingRecipe(), steps_total=10)
    training.step(next(random_rows(8192, 2, 8)))
    groups = checkpoint_tensors(training, Losses())
    length = bytes_of(groups)
    with tempfile.TemporaryDirectory() as folder:
        path = folder_for(length, Path(folder)) / f"llmos-bench-{time.time_ns()}"
        buffer = SaveBuffer(path, length)
        source, target = torch.ones(length // 4), torch.zeros(length // 4)
        stalls, copies = [], []
        for _ in range(arguments.pairs + 1):
            began = time.perf_counter()
            buffer.write(checkpoint_tensors(training, Losses()))
            middle = time.perf_counter()
            target.copy_(source)
            stalls.append(middle - began)
            copies.append(time.perf_counter() - middle)
            buffer.settle()
        buffer.close()
    ratios = [mine / copy for mine, copy in zip(stalls[1:], copies[1:])]
    return {
        "bytes": length,
        "stall_ms": round(statistics.median(stalls[1:]) * 1000, 2),
        "copy_ms": round(statistics.median(copies[1:]) * 1000, 2),
        "ratio": round(statistics.median(ratios), 3),
    }


def system(arguments: argparse.Namespace) -> dict[str, float]:
    """A job and a loop."""
    found = bench_system.measure(
        pairs=arguments.pairs, steps=arguments.steps, threads=arguments.threads
    )
    return asyncio.run(found)


WHAT: Final = {"minilm": minilm, "llama": llama, "nano": nano, "stall": stall, "system": system}
THREADS: Final = {"system": 1}
"""The system wants a core of its own."""


def main(given: list[str]) -> None:
    """One measurement."""
    parser = argparse.ArgumentParser(prog="llmos bench train", description=__doc__)
    parser.add_argument("what", choices=sorted(WHAT))
    parser.add_argument("--threads", type=int, help="all; 1 for system")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40, help="system: of a turn")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--folder", type=Path, help="minilm: of the encoder")
    parser.add_argument("--data", type=Path, help="minilm: a tsv file; nano: the text")
    parser.add_argument("--nanogpt", type=Path, help="nano: a checkout of it")
    arguments = parser.parse_args(given)
    if arguments.threads is None:
        arguments.threads = THREADS.get(arguments.what, torch.get_num_threads())
    torch.set_num_threads(arguments.threads)
    found = WHAT[arguments.what](arguments)
    print(json.dumps({"what": arguments.what, "threads": arguments.threads} | found))


if __name__ == "__main__":
    main(sys.argv[1:])
