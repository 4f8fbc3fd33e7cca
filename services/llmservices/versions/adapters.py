"""What a peft adapter does to its base: which tensors change, and by what formula.

W + scale * B @ A, where scale = alpha / r (Hu et al. 2021, arXiv 2106.09685, section 4.1), or
alpha / sqrt(r) with `use_rslora` (Kalajdzievski 2023, arXiv 2312.03732).  File layout: peft's
documentation, "PEFT checkpoint format".  What cannot be merged so is refused by its name.
"""

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

import msgspec
from llmproto.errors import RemoteError, invalid

from llmservices.versions.manifest import ADAPTER_CONFIG

PREFIX: Final = "base_model.model."
_PART: Final = re.compile(r"(.+)\.(lora_A\.weight|lora_B\.weight|lora_embedding_[AB])")


class AdapterConfig(msgspec.Struct, frozen=True):
    """What is read of adapter_config.json."""

    peft_type: str = ""
    r: int = 8
    lora_alpha: float = 8
    use_rslora: bool = False
    fan_in_fan_out: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    bias: str = "none"
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None
    layer_replication: list[list[int]] | None = None
    target_parameters: list[str] | None = None
    trainable_token_indices: msgspec.Raw = msgspec.Raw(b"null")
    base_model_name_or_path: str | None = None

    def scale(self, module: str, rank: int) -> float:
        """Of a module's product B @ A."""
        alpha = self.lora_alpha
        for pattern, own in (self.alpha_pattern or {}).items():
            if re.fullmatch(rf"(.*\.)?({pattern})", module):
                alpha = own
                break
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


class Change(msgspec.Struct, frozen=True):
    """What becomes of one tensor of the base: replaced whole, a product added, or both."""

    replaced: str | None = None
    """Name of the adapter's tensor that stands for it."""
    a: str | None = None
    b: str | None = None
    scale: float = 0.0
    transposed: bool = False
    """The product is transposed before it is added."""


def read_config(content: bytes, where: Path) -> AdapterConfig:
    """INVALID, by its name, for what is not implemented."""
    try:
        config = msgspec.json.decode(content, type=AdapterConfig)
    except msgspec.DecodeError as error:
        raise invalid(f"{where} is not an adapter's configuration: {error}") from None
    refused = {
        f"peft_type {config.peft_type!r}": config.peft_type != "LORA",
        "use_dora": config.use_dora,
        "lora_bias": config.lora_bias,
        f"bias {config.bias!r}": config.bias not in {"none", "all", "lora_only"},
        "layer_replication": bool(config.layer_replication),
        "target_parameters": bool(config.target_parameters),
        "trainable_token_indices": bytes(config.trainable_token_indices) not in {b"null", b"[]"},
    }
    for name, is_there in refused.items():
        if is_there:
            raise invalid(
                f"{where}: {name} is not implemented; merge the adapter with peft "
                "(merge_and_unload) and import the whole model"
            )
    return config


def changes(
    config: AdapterConfig,
    adapter: Mapping[str, list[int]],
    base: Iterable[str],
    where: Path,
) -> dict[str, Change]:
    """By the tensor of the base (or a new one: a head that the base has not).

    `adapter` gives the shapes of its tensors.  INVALID where half of a pair is missing, or a module
    is not in the base.
    """
    names = _Names(base)
    found: dict[str, Change] = {}
    for name in sorted(adapter):
        plain = name.removeprefix(PREFIX)
        part = _PART.fullmatch(plain)
        if part is None:
            if ".lora_" in plain:
                raise invalid(f"{where}: tensor {name} is of a kind that is not implemented")
            # peft saves embeddings whole beside their products, under this name.
            whole = plain.replace(".base_layer.", ".")
            of = names.find(whole) or whole
            found[of] = msgspec.structs.replace(found.get(of, Change()), replaced=name)
            continue
        module, kind = part[1], part[2]
        if kind in {"lora_B.weight", "lora_embedding_B"}:
            if name[: -len(kind)] + kind.replace("B", "A") not in adapter:
                raise _half(where, name)
            continue
        target = names.find(f"{module}.weight")
        if target is None:
            raise invalid(f"{where}: tensor {name} changes {module}.weight, which its base has not")
        other = name[: -len(kind)] + kind.replace("A", "B")
        if other not in adapter:
            raise _half(where, name)
        if len(adapter[name]) != 2 or len(adapter[other]) != 2:
            raise invalid(f"{where}: tensor {name} is no matrix; convolutions are not implemented")
        found[target] = msgspec.structs.replace(
            found.get(target, Change()),
            a=name,
            b=other,
            scale=config.scale(module, adapter[name][0]),
            transposed=config.fan_in_fan_out or kind.startswith("lora_embedding"),
        )
    return found


def _half(where: Path, name: str) -> RemoteError:
    return invalid(f"{where}: the other half of {name} is missing ({ADAPTER_CONFIG} beside it)")


class _Names:
    """Names of the base's tensors, with or without the prefix of the model within a head model
    (`bert.`, `transformer.`, `model.`), as checkpoints of either come."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = set(names)
        self._behind: dict[str, str] = {}
        for name in self._names:
            _, _, rest = name.partition(".")
            self._behind.setdefault(rest, name)

    def find(self, name: str) -> str | None:
        if name in self._names:
            return name
        _, _, rest = name.partition(".")
        return rest if rest in self._names else self._behind.get(name)
