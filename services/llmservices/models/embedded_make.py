"""Makes the embedded model: `python -m llmservices.models.embedded_make extract|tokenizer|train`.

Owns the recipe.  `extract` writes the corpus from the running Python's library, `tokenizer` the
tokenizer and the chat template, `train` the weights; each step needs the files of those before it.
Invariant: one recipe and one corpus give one order of data, whatever the machine.

Training takes about 25 minutes of one core with AVX512-BF16 (0.25 s a step).  It ends at a loss of
about 1.5 on what it sees and 2.8 on documents kept from it, in nats a token.
"""

import argparse
import gzip
import itertools
import json
import math
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jinja2
import msgspec
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM

from llmservices.models import embedded_corpus, embedded_extract

MODEL_FOLDER = Path(__file__).parent / "embedded"
BOS, END, USER, ASSISTANT, SYSTEM = SPECIAL_TOKENS = (
    "<|bos|>",
    "<|end|>",
    "<|user|>",
    "<|assistant|>",
    "<|system|>",
)
CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
    {%- if message['role'] not in ['system', 'user', 'assistant'] -%}
        {{- raise_exception('Roles are system, user and assistant, not ' + message['role']) -}}
    {%- endif -%}
    {{- '<|' + message['role'] + '|>' + message['content'] + '<|end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|assistant|>' -}}
{%- endif -%}
"""


class Recipe(msgspec.Struct, frozen=True):
    """Every number that the embedded model depends on."""

    vocabulary: int = 2048
    hidden: int = 192
    mlp: int = 448
    layers: int = 4
    heads: int = 6
    kv_heads: int = 2
    context: int = 1024
    rope_theta: float = 10_000.0

    seed: int = 20
    steps: int = 8_000
    """The length of the rate's schedule."""
    stop_step: int = 5_500
    """Where training stops: by then the loss on documents kept from it has begun to rise."""
    step_tokens: int = 2048
    block_tokens: int = 256
    """Attention costs the square of this on a CPU, so most steps see short blocks."""
    long_block_every: int = 24
    """Every so many steps the whole step is blocks of `context` tokens."""
    greetings: int = 160
    """Greetings in one epoch of about 13,000 samples."""
    rate_max: float = 3e-3
    rate_min: float = 3e-5
    warmup_steps: int = 200
    weight_decay: float = 0.05
    gradient_norm_max: float = 1.0
    average_decay: float = 0.998
    """What is saved is this moving average of the weights, good at every step."""
    save_every: int = 500


RECIPE = Recipe()


def make_corpus() -> None:
    """Write the corpus; the gzip header carries no time, so equal text gives equal bytes."""
    text = embedded_corpus.render(embedded_extract.extract())
    embedded_corpus.CORPUS_PATH.write_bytes(gzip.compress(text.encode(), 9, mtime=0))


def chat_text(turns: tuple[embedded_corpus.Turn, ...]) -> str:
    """What the chat template makes of a finished chat."""
    template = jinja2.Template(CHAT_TEMPLATE)
    messages = [{"role": turn.role, "content": turn.content} for turn in turns]
    text: str = template.render(messages=messages, bos_token=BOS, add_generation_prompt=False)
    return text


def sample_texts(recipe: Recipe, *, epoch: int) -> list[str]:
    """One epoch as texts with their special tokens."""
    samples = embedded_corpus.epoch(
        embedded_corpus.read(), seed=recipe.seed * 1000 + epoch, greetings=recipe.greetings
    )
    return [BOS + each + END if isinstance(each, str) else chat_text(each) for each in samples]


def make_tokenizer(recipe: Recipe) -> None:
    """Train the byte-level BPE on one epoch and write everything but config and weights."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocabulary,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sample_texts(recipe, epoch=0), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, 0)]
    )
    tokenizer.save(str(MODEL_FOLDER / "tokenizer.json"))
    settings: dict[str, object] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": END,
        "pad_token": END,
        "model_max_length": recipe.context,
        "clean_up_tokenization_spaces": False,
    }
    _write_json(MODEL_FOLDER / "tokenizer_config.json", settings)
    ids: dict[str, object] = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    _write_json(MODEL_FOLDER / "generation_config.json", ids)
    (MODEL_FOLDER / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


def _write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def token_blocks(recipe: Recipe, tokenizer: Tokenizer) -> Iterator[torch.Tensor]:
    """Endless steps of int64 [blocks, tokens]: shuffled samples end to end, epoch after epoch."""
    left: list[int] = []
    step = itertools.count()
    for epoch in itertools.count(1):
        for encoded in tokenizer.encode_batch(
            sample_texts(recipe, epoch=epoch), add_special_tokens=False
        ):
            left += encoded.ids
            while len(left) >= recipe.step_tokens:
                long = next(step) % recipe.long_block_every == recipe.long_block_every - 1
                block = recipe.context if long else recipe.block_tokens
                yield torch.tensor(left[: recipe.step_tokens]).view(-1, block)
                left = left[recipe.step_tokens :]


def new_model(recipe: Recipe) -> LlamaForCausalLM:
    """Random weights from the recipe's seed."""
    torch.manual_seed(recipe.seed)
    config = LlamaConfig(
        vocab_size=recipe.vocabulary,
        hidden_size=recipe.hidden,
        intermediate_size=recipe.mlp,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        max_position_embeddings=recipe.context,
        rope_parameters={"rope_type": "default", "rope_theta": recipe.rope_theta},
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return LlamaForCausalLM(config)


def save_model(recipe: Recipe, model: LlamaForCausalLM, folder: Path) -> None:
    """Write config and weights: bfloat16 on disk, float32 when loaded as the config says."""
    names = dict(model.named_parameters())  # Tied weights once.
    weights = {name: each.detach().to(torch.bfloat16).clone() for name, each in names.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    settings: dict[str, object] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": recipe.vocabulary,
        "hidden_size": recipe.hidden,
        "intermediate_size": recipe.mlp,
        "num_hidden_layers": recipe.layers,
        "num_attention_heads": recipe.heads,
        "num_key_value_heads": recipe.kv_heads,
        "head_dim": recipe.hidden // recipe.heads,
        "max_position_embeddings": recipe.context,
        "rms_norm_eps": model.config.rms_norm_eps,
        "rope_theta": recipe.rope_theta,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "initializer_range": 0.02,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
        "use_cache": True,
        "dtype": "float32",
    }
    _write_json(folder / "config.json", settings)


def rate_at(recipe: Recipe, step: int) -> float:
    """Linear warm-up, then half a cosine down to `rate_min`."""
    if step < recipe.warmup_steps:
        return recipe.rate_max * (step + 1) / recipe.warmup_steps
    done = (step - recipe.warmup_steps) / max(1, recipe.steps - recipe.warmup_steps)
    return (
        recipe.rate_min + (recipe.rate_max - recipe.rate_min) * (1 + math.cos(math.pi * done)) / 2
    )


def held_out_tokens(recipe: Recipe, tokenizer: Tokenizer) -> torch.Tensor:
    """The documents that training never sees, as int64 [blocks, block_tokens]."""
    texts = [each.text for each in embedded_corpus.read() if embedded_corpus.held_out(each)]
    random.Random(recipe.seed).shuffle(texts)
    ids = tokenizer.encode(
        "".join(BOS + text + END for text in texts), add_special_tokens=False
    ).ids
    blocks = len(ids) // recipe.block_tokens
    return torch.tensor(ids[: blocks * recipe.block_tokens]).view(blocks, -1)


def loss_of(model: LlamaForCausalLM, tokens_BT: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in nats of each token after the first of its block."""
    loss = model(input_ids=tokens_BT, labels=tokens_BT, use_cache=False).loss
    assert isinstance(loss, torch.Tensor)
    return loss


def make_weights(recipe: Recipe, folder: Path) -> None:
    """Train on one thread, saving config and weights in `folder` as it goes."""
    torch.set_num_threads(1)
    tokenizer = Tokenizer.from_file(str(MODEL_FOLDER / "tokenizer.json"))
    held_out_BT = held_out_tokens(recipe, tokenizer)
    model = new_model(recipe)
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    average = new_model(recipe)
    optimizer = torch.optim.AdamW(groups, lr=recipe.rate_max, betas=(0.9, 0.98), fused=True)
    started = time.perf_counter()
    smooth = math.log(recipe.vocabulary)
    blocks = itertools.islice(token_blocks(recipe, tokenizer), recipe.stop_step)
    for step, tokens_BT in enumerate(blocks):
        for group in optimizer.param_groups:
            group["lr"] = rate_at(recipe, step)
        # The fused kernel's backward is slow on a CPU; only long blocks are worse without it.
        short = tokens_BT.shape[1] < recipe.context
        model.set_attn_implementation("eager" if short else "sdpa")
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, tokens_BT)
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        torch.nn.utils.clip_grad_norm_(parameters, recipe.gradient_norm_max)
        optimizer.step()
        with torch.no_grad():
            for kept, now in zip(average.parameters(), parameters, strict=True):
                kept.lerp_(now, 1 - min(recipe.average_decay, (step + 1) / (step + 10)))
        optimizer.zero_grad()
        smooth += (loss.item() - smooth) * 0.02
        done = step + 1
        if done % recipe.save_every == 0 or done == recipe.stop_step:
            save_model(recipe, average, folder)
            with torch.no_grad():
                unseen = loss_of(average, held_out_BT).item()
            seconds = time.perf_counter() - started
            print(
                f"step {done} loss {smooth:.3f} held out {unseen:.3f} {seconds:.0f} s", flush=True
            )


def main(arguments: list[str]) -> None:
    """Run one step."""
    parser = argparse.ArgumentParser(prog="embedded_make", description="Makes the embedded model.")
    parser.add_argument("step", choices=("extract", "tokenizer", "train"))
    parser.add_argument("--stop-step", type=int, default=RECIPE.stop_step, help="last step")
    parser.add_argument("--out", type=Path, default=MODEL_FOLDER, help="where train saves")
    asked = parser.parse_args(arguments)
    asked.out.mkdir(parents=True, exist_ok=True)
    match asked.step:
        case "extract":
            make_corpus()
        case "tokenizer":
            make_tokenizer(RECIPE)
        case _:
            make_weights(msgspec.structs.replace(RECIPE, stop_step=asked.stop_step), asked.out)


if __name__ == "__main__":
    main(sys.argv[1:])
