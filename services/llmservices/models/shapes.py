"""Model folders of real shapes with random weights, for measuring where no real weights can be had.

`python -m llmservices.models.shapes qwen2-0.5b FOLDER` writes a complete Hugging Face folder:
config, one safetensors file, and a byte-level tokenizer with as many tokens as the shape has rows,
so that every id that a random model picks has a text.
"""

import argparse
import json
from pathlib import Path
from typing import Final

import msgspec
import torch
from safetensors.torch import save_file

DTYPE: Final = torch.bfloat16
SCALE: Final = 0.02
END_OF_TEXT: Final = "<|endoftext|>"


class Shape(msgspec.Struct, frozen=True):
    """The numbers of a published configuration (its `config.json` on the Hugging Face hub)."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    vocab: int
    rope_theta: float
    qkv_bias: bool
    model_type: str
    architecture: str


SHAPES: Final = {
    "qwen2-0.5b": Shape(896, 24, 14, 2, 64, 4864, 151_936, 1e6, True, "qwen2", "Qwen2ForCausalLM"),
    "llama-1b": Shape(2048, 16, 32, 8, 64, 8192, 128_256, 5e5, False, "llama", "LlamaForCausalLM"),
    "llama-8b": Shape(
        4096, 32, 32, 8, 128, 14_336, 128_256, 5e5, False, "llama", "LlamaForCausalLM"
    ),
    "tiny": Shape(192, 6, 6, 2, 32, 512, 2048, 1e4, False, "llama", "LlamaForCausalLM"),
}


def tensors(shape: Shape, *, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights by their names in a checkpoint; embeddings are tied."""
    generator = torch.Generator().manual_seed(seed)

    def weight(*sizes: int) -> torch.Tensor:
        return (torch.randn(*sizes, generator=generator) * SCALE).to(DTYPE)

    ones = torch.ones(shape.hidden, dtype=DTYPE)
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    found = {
        "model.embed_tokens.weight": weight(shape.vocab, shape.hidden),
        "model.norm.weight": ones.clone(),
    }
    for layer in range(shape.layers):
        at = f"model.layers.{layer}."
        found |= {
            f"{at}input_layernorm.weight": ones.clone(),
            f"{at}post_attention_layernorm.weight": ones.clone(),
            f"{at}self_attn.q_proj.weight": weight(queries, shape.hidden),
            f"{at}self_attn.k_proj.weight": weight(keys, shape.hidden),
            f"{at}self_attn.v_proj.weight": weight(keys, shape.hidden),
            f"{at}self_attn.o_proj.weight": weight(shape.hidden, queries),
            f"{at}mlp.gate_proj.weight": weight(shape.inner, shape.hidden),
            f"{at}mlp.up_proj.weight": weight(shape.inner, shape.hidden),
            f"{at}mlp.down_proj.weight": weight(shape.hidden, shape.inner),
        }
        if shape.qkv_bias:
            found |= {
                f"{at}self_attn.q_proj.bias": weight(queries),
                f"{at}self_attn.k_proj.bias": weight(keys),
                f"{at}self_attn.v_proj.bias": weight(keys),
            }
    return found


def config(shape: Shape, *, context_tokens: int) -> dict[str, object]:
    """What `config.json` says."""
    return {
        "architectures": [shape.architecture],
        "model_type": shape.model_type,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.inner,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab,
        "max_position_embeddings": context_tokens,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "rope_theta": shape.rope_theta,
        "tie_word_embeddings": True,
        "dtype": str(DTYPE).removeprefix("torch."),
    }


def tokenizer(vocab: int) -> dict[str, object]:
    """A byte-level vocabulary: every byte, one merge of two, words that only decoding meets, and an
    end of text.

    Other programs need the merge and the end: they refuse a vocabulary without merges, and to one
    without an end they add theirs beyond the last row.
    """
    letters = _byte_letters()
    tokens = {letter: number for number, letter in enumerate(letters)}
    tokens["Ġw"] = len(tokens)
    tokens |= {f"Ġw{number}": number for number in range(len(tokens), vocab - 1)}
    tokens[END_OF_TEXT] = vocab - 1
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": tokens, "merges": ["Ġ w"]},
    }


def _byte_letters() -> list[str]:
    """The printable letter that stands for each byte in byte-level vocabularies.

    Source: Radford et al. 2019 (GPT-2): printable bytes stand for themselves, the others are moved
    behind U+0100 in order.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(hidden)) for byte in range(256)]


def write(name: str, folder: Path, *, context_tokens: int = 4096) -> None:
    """Make the folder."""
    shape = SHAPES[name]
    folder.mkdir(parents=True, exist_ok=True)
    for file, content in (
        ("config.json", config(shape, context_tokens=context_tokens)),
        ("tokenizer.json", tokenizer(shape.vocab)),
        ("tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"}),
    ):
        (folder / file).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    save_file(tensors(shape), folder / "model.safetensors", metadata={"format": "pt"})


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="llmservices.models.shapes", description=__doc__)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--context", type=int, default=4096)
    said = parser.parse_args()
    write(said.shape, said.folder, context_tokens=said.context)


if __name__ == "__main__":
    main()
