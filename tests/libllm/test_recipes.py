"""Recipes: what is read, what is refused, and how it is said."""

from pathlib import Path

import pytest
from libllm.recipes import Flags, check_gate, evaluation_of, recipe_of
from llmproto.errors import ErrorKind, RemoteError
from llmproto.recipes import Recipe

FULL = """\
name = "tiny"
base = "llmos-mini"
[data]
train = ["a.jsonl", "/data/b.jsonl"]
validation = "no"
"""
GOOD = 'name = "tiny"\nbase = "llmos-mini"\n[data]\ntrain = ["a.jsonl"]\n'
PRETRAIN = (
    'name = "tiny"\nmethod = "pretrain"\n[data]\ntrain = ["a.txt"]\n[model]\nwidth = 8\nheads = 2\n'
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.toml"
    path.write_text(text)
    return path


def refusal(folder: Path, text: str) -> str:
    """What is said of it, without the file's name, which must stand in front."""
    path = write(folder, text)
    with pytest.raises(RemoteError) as caught:
        recipe_of(path, {})
    assert caught.value.kind is ErrorKind.INVALID
    name, _, rest = caught.value.detail.partition(": ")
    assert name == str(path)
    return rest


def test_paths_are_relative_to_the_file(folder: Path) -> None:
    (folder / "model").mkdir()
    text = (
        'name = "tiny"\nbase = "model"\nmethod = "lora"\n[data]\ntrain = ["a.jsonl", "/b.jsonl"]\n'
        'validation = ["../c.jsonl"]\n[data.augment]\nsynonyms = "words"\n'
        '[finish]\ntensorboard = "events"\n'
    )
    recipe = recipe_of(write(folder, text), {})
    assert recipe.base == str(folder / "model")
    assert recipe.data.train == [str(folder / "a.jsonl"), "/b.jsonl"]
    assert recipe.data.validation == [str(folder.parent / "c.jsonl")]
    assert recipe.data.augment is not None
    assert recipe.data.augment.synonyms == str(folder / "words")
    assert recipe.finish.tensorboard == str(folder / "events")


def test_a_base_that_is_no_folder_is_a_reference(folder: Path) -> None:
    assert recipe_of(write(folder, GOOD), {}).base == "llmos-mini"
    nowhere = GOOD.replace("llmos-mini", "./nowhere")
    assert recipe_of(write(folder, nowhere), {}).base == str(folder / "nowhere")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (GOOD + "[training]\nepoch = 1\n", "unknown key training.epoch; did you mean epochs?"),
        (GOOD + "[data.clean]\nrepeat = 1\n", "unknown key data.clean.repeat; "),
        ("colour = 1\n" + GOOD, "unknown key colour; "),
        (GOOD + '[training]\nbatch = "x"\n', "training.batch: Expected `int`, got `str`"),
        (GOOD + "[training]\nbatch = 0\n", "training.batch: Expected `int` >= 1"),
        (FULL, "data.validation: Expected `array`, got `str`"),
        ('base = "x"\n', "the key name is missing"),
        ("name = \n", "Invalid value"),
        (GOOD + "[training]\nepochs = 1\nsteps = 2\n", "training.epochs and training.steps"),
        ('name = "x"\n[data]\ntrain = ["a"]\n', "method = 'full' needs base"),
        (GOOD.replace('base = "llmos-mini"', 'method = "lora"'), "method = 'lora' needs base"),
        (PRETRAIN.replace("[data]", 'base = "x"\n[data]', 1), "method = 'pretrain' starts from"),
        (PRETRAIN.replace("[data]", 'task = "classify"\n[data]', 1), "method = 'pretrain' makes"),
        (PRETRAIN.split("[model]")[0], "method = 'pretrain' needs the table [model]"),
        (PRETRAIN.replace("width = 8", "width = 9"), "model.width (9) is no multiple of model."),
        (PRETRAIN + "kv_heads = 3\n", "model.heads (2) is no multiple of model.kv_heads (3)"),
        (PRETRAIN + "context_tokens = 8\n[training]\ncontext_tokens = 9\n", "training.context_tok"),
        (PRETRAIN + '[tokenizer]\nkind = "folder"\n', "tokenizer.path goes with"),
        (GOOD + "[model]\nwidth = 8\n", "[model] is for method = 'pretrain'"),
        (GOOD + "[lora]\nrank = 8\n", "[lora] is for method = 'lora', and it is 'full'"),
        ('name = "x"\nbase = "y"\n', "data.train names no file"),
        (GOOD + 'validation = ["v"]\nvalidation_share = 0.1\n', "data.validation and data.valid"),
        (GOOD + "[training]\nbatch = 2\nprocesses = 4\n", "training.batch (2) leaves some"),
        (GOOD + "[training]\nstop_early_after = 2\n", "training.stop_early_after needs"),
        (GOOD + '[finish]\ngate = "loss<1"\n', "finish.gate says when to deploy"),
        (GOOD + '[finish]\ndeploy = true\ngate = "good"\n', "the gate 'good' does not read like"),
        (GOOD + '[finish]\nevaluate = ["loss"]\n', "finish.evaluate needs data.validation"),
        (
            GOOD + '[finish]\nevaluate = ["accuracy"]\n',
            "finish.evaluate names accuracy; while training to generate there are",
        ),
        (GOOD + '[finish]\nevaluate = ["bleu"]\n', "finish.evaluate names bleu; while"),
        (GOOD + '[finish]\nevaluate = ["magic"]\n', "finish.evaluate names magic; while"),
    ],
)
def test_what_is_refused(folder: Path, text: str, said: str) -> None:
    assert refusal(folder, text).startswith(said)


def test_the_readme_has_two_complete_recipes(folder: Path) -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    blocks = [part.partition("```")[0] for part in readme.split("```toml\n")[1:]]
    recipes = [recipe_of(write(folder, text), {}) for text in blocks if "method = " in text]
    assert [recipe.method for recipe in recipes] == ["pretrain", "lora"]


def test_a_file_that_is_not_there(folder: Path) -> None:
    with pytest.raises(RemoteError, match=r"recipe\.toml cannot be read: No such file"):
        recipe_of(folder / "recipe.toml", {})


def test_flags_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    flags: Flags = {
        "name": "bot",
        "base": "llmos-mini",
        "data": "train.jsonl",
        "method": "lora",
        "steps": 5,
        "deploy": True,
        "gate": "loss<2, accuracy >= 0.87",
        "sets": {"training.warmup_steps": 3, "lora.rank": 4},
        "batch": None,
    }
    recipe = recipe_of(None, flags)
    assert recipe.data.train == [str(folder / "train.jsonl")]
    assert (recipe.method, recipe.training.steps, recipe.training.batch) == ("lora", 5, 16)
    assert (recipe.training.warmup_steps, recipe.finish.deploy) == (3, True)
    assert recipe.lora is not None
    assert recipe.lora.rank == 4


def test_flags_go_over_a_file(folder: Path) -> None:
    path = write(folder, GOOD + "[training]\nepochs = 2\nbatch = 4\n")
    training = recipe_of(path, {"steps": 7, "name": "other"}).training
    assert (training.epochs, training.steps, training.batch) == (None, 7, 4)
    with pytest.raises(RemoteError, match=r"training\.epochs and training\.steps"):
        recipe_of(path, {"steps": 7, "epochs": 1})


def test_flags_that_do_not_exist() -> None:
    with pytest.raises(RemoteError, match="train takes no 'colour'"):
        recipe_of(None, {"colour": 1})  # type: ignore[typeddict-unknown-key]


def test_a_recipe_as_a_struct() -> None:
    with pytest.raises(RemoteError, match="needs base"):
        recipe_of(Recipe(name="x"), {})
    with pytest.raises(RemoteError, match="a Recipe, or flags"):
        recipe_of(Recipe(name="x"), {"batch": 4})


def test_gates() -> None:
    check_gate("accuracy>=0.87")
    check_gate("f1_per_class/yes > 0.5,loss<1e-2")
    for wrong in ("", "accuracy", "accuracy>=", "accuracy=>1", "a>1,"):
        with pytest.raises(RemoteError, match="does not read like"):
            check_gate(wrong)


def test_an_evaluation(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    found = evaluation_of("bot", "t.jsonl", ["f1"], sets={"data.label": "y"})
    assert found.data.train == [str(folder / "t.jsonl")]
    assert found.data.label == "y"
    for metrics, said in ((["magic"], "unknown metric 'magic'"), ([], "no metric is named")):
        with pytest.raises(RemoteError, match=said):
            evaluation_of("bot", "t.jsonl", metrics)
    with pytest.raises(RemoteError, match="needs data"):
        evaluation_of("bot", [], ["f1"])
