"""What a model folder says of the memory that its model takes."""

import json
from pathlib import Path
from typing import Final

_BYTES: Final = {"float32": 4, "bfloat16": 2, "float16": 2}


def weight_bytes(folder: Path) -> int:
    """As they are stored."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def kv_token_bytes(folder: Path) -> int:
    """Keys and values of one token, by the names that the llama family uses; 0 where they are
    others."""
    said = json.loads((folder / "config.json").read_text())
    dtype = said.get("dtype") or said.get("torch_dtype")
    try:
        heads = said.get("num_key_value_heads", said["num_attention_heads"])
        dim = said.get("head_dim") or said["hidden_size"] // said["num_attention_heads"]
        return int(said["num_hidden_layers"] * 2 * heads * dim * _BYTES.get(dtype, 4))
    except KeyError:
        return 0
