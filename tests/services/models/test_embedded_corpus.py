"""The corpus: its files, the mechanical questions, and what is kept from training."""

import random
from pathlib import Path

import pytest
from llmservices.models import embedded_corpus
from llmservices.models.embedded_corpus import CHAT, PART, Document, Turn


def document(text: str, *, kind: str = "function", name: str = "os.path.join") -> Document:
    return Document(kind=kind, name=name, text=f"title\n\n{text}")


def test_documents_that_are_written_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded_corpus, "CORPUS_PATH", tmp_path / "corpus")
    monkeypatch.setattr(embedded_corpus, "HELD_OUT_PATH", tmp_path / "held_out")
    documents = [
        document("Joins \u00e9.\n\nMore.", kind=kind, name=f"{kind}.{number}")
        for kind in embedded_corpus.QUESTIONS
        for number in range(40)
    ]
    embedded_corpus.write(documents)
    kept = [each for each in documents if embedded_corpus.held_out(each)]
    learned = [each for each in documents if not embedded_corpus.held_out(each)]
    assert kept
    assert embedded_corpus.read() == learned + kept
    first = (tmp_path / "corpus").read_bytes()
    embedded_corpus.write(documents)
    assert (tmp_path / "corpus").read_bytes() == first


def test_the_committed_files_are_what_their_documents_give() -> None:
    learned = embedded_corpus.read_rows()
    assert list(embedded_corpus.rows(embedded_corpus.read())) == learned
    hidden = embedded_corpus.read_rows(embedded_corpus.HELD_OUT_PATH)
    assert len(hidden) > 100
    assert not {each.name for each in hidden} & {each.name for each in learned}
    assert {each.kind for each in learned} == {CHAT, PART, *embedded_corpus.QUESTIONS}


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
