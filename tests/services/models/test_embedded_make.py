"""What the recipe reads is what the committed files are, and one `llmos train` accepts it."""

import json
from pathlib import Path

from libllm.recipes import recipe_of
from llmproto.generation import ChatMessage
from llmproto.recipes import ArchitectureRecipe
from llmservices.data.examples import Source, examples
from llmservices.data.rendering import NOW, Renderer
from llmservices.data.rows import Tally
from llmservices.models import embedded_corpus, embedded_make
from llmservices.models.embedded_corpus import Turn
from llmservices.texts.templates import ChatTemplate
from llmservices.trainer.architectures import Special, described

CHAT = (Turn("user", "Hi"), Turn("assistant", "Hello!"), Turn("user", "a"), Turn("assistant", "b"))


def test_the_committed_config_is_the_recipes() -> None:
    recipe = recipe_of(embedded_make.RECIPE, {})
    assert isinstance(recipe.model, ArchitectureRecipe)
    config = json.loads((embedded_make.MODEL_FOLDER / "config.json").read_text(encoding="utf-8"))
    made = described(recipe.model, Special(embedded_make.VOCABULARY, 0, 1))
    assert {key: config.get(key, 0.0) for key in made} == made
    assert config["max_position_embeddings"] == embedded_make.CONTEXT_TOKENS


def test_the_recipe_names_committed_files() -> None:
    recipe = recipe_of(embedded_make.RECIPE, {})
    assert recipe.method == "pretrain"
    assert recipe.tokenizer is not None
    assert recipe.tokenizer.path == str(embedded_make.MODEL_FOLDER)
    assert recipe.data.train == [str(embedded_corpus.CORPUS_PATH)]
    assert recipe.data.validation == [str(embedded_corpus.HELD_OUT_PATH)]


def test_the_data_service_reads_the_corpus_row_by_row() -> None:
    recipe = recipe_of(embedded_make.RECIPE, {})
    source = Source(files=(embedded_corpus.CORPUS_PATH,), recipe=recipe.data, task="generate")
    found = list(examples(source, Tally(), lambda shape: None))
    renderer = Renderer(None, learn_all=False)
    texts = [renderer.render(each.example).text for each in found]
    assert texts == [row.text for row in embedded_corpus.read_rows()]


def test_the_committed_tokenizer_and_template_are_made_of_the_corpus(tmp_path: Path) -> None:
    embedded_make.make_tokenizer(tmp_path)
    made = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert len(made) == 4
    for name, content in made.items():
        assert content == (embedded_make.MODEL_FOLDER / name).read_bytes(), name


def test_a_chat_is_learned_as_the_template_writes_it() -> None:
    template = ChatTemplate(embedded_make.CHAT_TEMPLATE, {"bos_token": "<|bos|>"})
    for turns in (CHAT, CHAT[:2], (Turn("system", "Be brief."), *CHAT)):
        inner = embedded_corpus.inner_text(turns)
        messages = [ChatMessage(role=turn.role, content=turn.content) for turn in turns]
        text = template.render(messages, now=NOW, add_generation_prompt=False)
        assert f"<|bos|>{inner}<|end|>" == text
    assert embedded_corpus.inner_text(CHAT[:2]) == "<|user|>Hi<|end|><|assistant|>Hello!"
