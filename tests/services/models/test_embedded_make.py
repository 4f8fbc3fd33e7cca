"""The recipe: it describes the committed files, and its schedule does what it says."""

import json

import pytest
import torch
from llmservices.models.embedded_corpus import Turn

embedded_make = pytest.importorskip(
    "llmservices.models.embedded_make",
    reason="transformers is absent",
    exc_type=ImportError,
)


def test_committed_config_is_the_recipe() -> None:
    recipe = embedded_make.RECIPE
    config = json.loads((embedded_make.MODEL_FOLDER / "config.json").read_text(encoding="utf-8"))
    assert (config["vocab_size"], config["hidden_size"]) == (recipe.vocabulary, recipe.hidden)
    assert (config["num_hidden_layers"], config["intermediate_size"]) == (recipe.layers, recipe.mlp)
    assert config["max_position_embeddings"] == recipe.context


def test_committed_chat_template_is_the_one_trained_with() -> None:
    committed = (embedded_make.MODEL_FOLDER / "chat_template.jinja").read_text(encoding="utf-8")
    assert committed == embedded_make.CHAT_TEMPLATE


def test_a_chat_ends_with_the_end_token() -> None:
    text = embedded_make.chat_text((Turn("user", "Hi"), Turn("assistant", "Hello!")))
    assert text == "<|bos|><|user|>Hi<|end|><|assistant|>Hello!<|end|>"


def test_rate_rises_to_the_maximum_and_falls_to_the_minimum() -> None:
    recipe = embedded_make.RECIPE
    rates = [embedded_make.rate_at(recipe, step) for step in range(recipe.steps + 1)]
    peak = rates.index(max(rates))
    assert peak in {recipe.warmup_steps - 1, recipe.warmup_steps}
    assert max(rates) == pytest.approx(recipe.rate_max)
    assert rates[-1] == pytest.approx(recipe.rate_min)
    assert rates[:peak] == sorted(rates[:peak])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)


def test_new_models_are_equal_and_start_near_a_uniform_guess() -> None:
    recipe = embedded_make.RECIPE
    one, other = embedded_make.new_model(recipe), embedded_make.new_model(recipe)
    for mine, theirs in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    with torch.no_grad():
        loss = embedded_make.loss_of(one, torch.arange(64).view(1, 64))
    assert 7.0 < loss.item() < 8.5
