"""Models that are loaded from a version compute what they compute from their plain folder."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from llmproto.errors import RemoteError
from llmservices.models.encoder import Encoder
from llmservices.models.foreign import ForeignEncoder, ForeignModel
from llmservices.models.loading import load
from llmservices.store.archive import Archive
from llmservices.versions.manifest import folder_of, object_path, read_manifest

from ..encoders import make

CPU = torch.device("cpu")
TOKENS = [2, 7, 9, 3]


def imported(archive: Archive, source: Path) -> Path:
    return folder_of(archive.root, archive.import_folder(source, "model", None).version)


def test_a_foreign_model_is_loaded_from_a_version(archive: Archive, tmp_path: Path) -> None:
    config = transformers.OPTConfig(
        vocab_size=97, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, word_embed_proj_dim=32, init_std=0.3,
    )  # fmt: skip
    library: Any = transformers.AutoModelForCausalLM  # Any: untyped
    source = tmp_path / "opt"
    library.from_config(config, dtype=torch.float32).save_pretrained(source)
    folder = imported(archive, source)
    plain, version = load(source, device=CPU), load(folder, device=CPU)
    assert isinstance(plain, ForeignModel) and isinstance(version, ForeignModel)
    wanted = library.from_pretrained(source, dtype=torch.float32).eval()
    with torch.inference_mode():
        logits = [module(torch.tensor([TOKENS])).logits for module in (version._module, wanted)]
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=0)
    group = read_manifest(folder)[0].group("model.safetensors")
    assert group is not None
    object_path(archive.root, group.tensors[0].objects[0]).unlink()
    with pytest.raises(RemoteError, match="is damaged"):
        load(folder, device=CPU)


@pytest.mark.parametrize("labels", [(), ("no", "yes")])
@pytest.mark.parametrize("family", ["bert", "electra"])
def test_an_encoder_is_loaded_from_a_version(
    archive: Archive, tmp_path: Path, family: str, labels: tuple[str, ...]
) -> None:
    source, _ = make(tmp_path / family, family, labels=labels)
    folder = imported(archive, source)
    found = []
    for place in (source, folder):
        model = load(place, device=CPU)
        assert isinstance(model, ForeignEncoder if family == "electra" else Encoder)
        assert model.task.labels == labels
        tokens = np.asarray(TOKENS)
        found.append(model.encode(tokens, np.zeros_like(tokens), [len(TOKENS)]))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)
