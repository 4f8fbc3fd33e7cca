"""Makes what the embedded model's recipe reads: `python -m llmservices.models.embedded_make STEP`.

`extract` writes the corpus from the running Python's library, `tokenizer` the tokenizer and the
chat template from the corpus.  The weights are made by `llmos train embedded_recipe.toml`.
Invariant: one corpus gives one tokenizer, byte for byte, whatever the machine.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Final

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from llmservices.models import embedded_corpus, embedded_extract

MODEL_FOLDER: Final = Path(__file__).parent / "embedded"
RECIPE: Final = Path(__file__).parent / "embedded_recipe.toml"
VOCABULARY: Final = 2048
CONTEXT_TOKENS: Final = 1024
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


def make_corpus() -> None:
    """Write the corpus."""
    embedded_corpus.write(embedded_extract.extract())


def sample_texts() -> list[str]:
    """One epoch as texts with their special tokens: what the tokenizer is made of."""
    samples = embedded_corpus.epoch(
        embedded_corpus.read(),
        seed=embedded_corpus.SEED,
        greetings=embedded_corpus.GREETINGS_COUNT,
    )
    texts = (
        each if isinstance(each, str) else embedded_corpus.inner_text(each) for each in samples
    )
    return [BOS + text + END for text in texts]


def make_tokenizer(folder: Path) -> None:
    """Train the byte-level BPE on one epoch and write everything but config and weights."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sample_texts(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, 0)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    settings: dict[str, object] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": END,
        "pad_token": END,
        "model_max_length": CONTEXT_TOKENS,
        "clean_up_tokenization_spaces": False,
    }
    _write_json(folder / "tokenizer_config.json", settings)
    ids: dict[str, object] = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    _write_json(folder / "generation_config.json", ids)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


def _write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def main(arguments: list[str]) -> None:
    """Run one step."""
    parser = argparse.ArgumentParser(prog="embedded_make", description="Makes what is trained on.")
    parser.add_argument("step", choices=("extract", "tokenizer"))
    if parser.parse_args(arguments).step == "extract":
        make_corpus()
    else:
        make_tokenizer(MODEL_FOLDER)


if __name__ == "__main__":
    main(sys.argv[1:])
