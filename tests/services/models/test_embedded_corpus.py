"""The corpus: its file format, the mechanical questions, and what is kept from training."""

import random

from hypothesis import given
from hypothesis import strategies as st
from llmservices.models import embedded_corpus
from llmservices.models.embedded_corpus import Document, Turn

LINES = st.text(
    st.characters(codec="utf-8", exclude_characters="\r\n\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029")
)
WORDS = st.text("abc._,` ", min_size=1).filter(lambda text: text.strip() == text)
TEXTS = st.lists(LINES.filter(lambda line: not line.startswith(embedded_corpus.HEADER))).map(
    lambda lines: "\n".join(lines).strip("\n")
)
DOCUMENTS = st.builds(
    Document, kind=st.sampled_from(sorted(embedded_corpus.QUESTIONS)), name=WORDS, text=TEXTS
)


def document(text: str, *, kind: str = "function", name: str = "os.path.join") -> Document:
    return Document(kind=kind, name=name, text=f"title\n\n{text}")


@given(st.lists(DOCUMENTS))
def test_parse_is_the_inverse_of_render(documents: list[Document]) -> None:
    assert embedded_corpus.parse(embedded_corpus.render(documents)) == documents


def test_committed_corpus_is_large_and_well_formed() -> None:
    documents = embedded_corpus.read()
    assert len(documents) > 5_000
    assert {each.kind for each in documents} == set(embedded_corpus.QUESTIONS)
    assert len({each.name for each in documents}) == len(documents)
    assert all(each.text.strip() for each in documents)


def test_answer_is_the_first_prose_cut_at_a_sentence() -> None:
    cases = {
        "Join names.": "Join names.",
        "Join\nnames.": "Join names.",
        "Join names. For example:": "Join names.",
        "A list follows:": "A list follows.",
        "x ::= y.\n\nThen prose.": "Then prose.",
        "path\n  Of the file.\n\nProse.": "Prose.",
        "a | b": None,
        "Long sentence number one. " * 40: "Long sentence number one. " * 15
        + "Long sentence number one.",
    }
    for text, said in cases.items():
        assert embedded_corpus.answer(document(text.strip())) == said


def test_an_epoch_is_a_function_of_its_seed_and_has_nothing_held_out() -> None:
    documents = random.Random(1).sample(embedded_corpus.read(), 600)
    first = embedded_corpus.epoch(documents, seed=3, greetings=5)
    assert first == embedded_corpus.epoch(documents, seed=3, greetings=5)
    assert first != embedded_corpus.epoch(documents, seed=4, greetings=5)
    hidden = [each.text for each in documents if embedded_corpus.held_out(each)]
    assert hidden
    assert not set(hidden) & {each for each in first if isinstance(each, str)}


def test_chats_alternate_and_end_with_the_assistant() -> None:
    samples = embedded_corpus.epoch(embedded_corpus.read()[:300], seed=1, greetings=20)
    chats = [each for each in samples if isinstance(each, tuple)]
    assert len(chats) > 100
    for chat in chats:
        turns = chat[1:] if chat[0].role == "system" else chat
        assert [turn.role for turn in turns] == ["user", "assistant"] * (len(turns) // 2)
        assert all(isinstance(turn, Turn) and turn.content for turn in turns)
