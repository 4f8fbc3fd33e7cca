"""The text that the embedded model learns from, as documents and as questions with answers.

Owns the content of `embedded_corpus.jsonl.gz` (what is learned) and `embedded_held_out.jsonl.gz`
(what measures), which the data service reads as plain text, and everything made from documents
mechanically.  Invariant: the same documents and the same seed give the same samples in the same
order, and a document that `held_out` names is in no sample.  Never reads anything but these files.
"""

import gzip
import random
import zlib
from collections.abc import Iterator
from pathlib import Path

import msgspec

CORPUS_PATH = Path(__file__).parent / "embedded_corpus.jsonl.gz"
HELD_OUT_PATH = Path(__file__).parent / "embedded_held_out.jsonl.gz"
SEED = 20_000
GREETINGS_COUNT = 160
"""Among about 13,000 samples."""
GREETINGS_LEARNED = 600
"""In the corpus: who it is must be certain, and documents are many."""
CHAT = "chat"
PART = "part"

HELD_OUT_ONE_IN = 50
ANSWER_CHARS_MAX = 420
QUESTION_NAME_CHARS_MAX = 60

SELF = "I am the small model embedded in llmos. I was trained on the Python documentation."

GREETINGS = (
    (("Hi", "Hi!", "hi", "Hey", "Hi there", "hey"), f"Hi! {SELF} Ask me about Python."),
    (("Hello", "Hello!", "hello", "Hello there", "Good morning"), f"Hello! {SELF}"),
    (("Who are you?", "who are you", "Who is this?", "What are you?", "what are you?"), SELF),
    (("What is llmos?", "what is llmos"), "llmos is an operating system for language models."),
    (
        ("What can you do?", "what can you do", "Help", "help", "How can you help me?"),
        "I can write a little English about Python. Ask me what a function or a statement does.",
    ),
    (
        ("How are you?", "how are you", "How are you doing?"),
        "I am running, thank you. Ask me about Python.",
    ),
    (("Thanks", "Thank you", "thanks!", "Thank you!"), "You are welcome."),
    (("Bye", "Goodbye", "bye", "Good bye!"), "Goodbye!"),
    (
        ("What is Python?", "what is python", "Tell me about Python.", "Explain Python"),
        "Python is a programming language. Its documentation is what I was trained on.",
    ),
)

SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You answer questions about Python.",
    "You are the model embedded in llmos.",
    "Be brief.",
)

QUESTIONS = {
    "topic": (
        "Explain {}.",
        "Explain {}",
        "What is {}?",
        "Tell me about {}.",
        "How does {} work?",
        "Please explain {}.",
        "What can you tell me about {}?",
    ),
    "module": (
        "What is the {} module for?",
        "What is {}?",
        "What does the {} module do?",
        "Tell me about the {} module.",
        "Explain {}.",
    ),
    "class": (
        "What is {}?",
        "Explain {}.",
        "Tell me about {}.",
        "What is the class {} for?",
        "what is {}",
    ),
    "function": (
        "What does {} do?",
        "What does {}() do?",
        "Explain {}.",
        "What is {}?",
        "what does {} do",
        "Tell me about {}.",
    ),
}


class Document(msgspec.Struct, frozen=True):
    """One entry of the documentation: `text` describes what `name` and `kind` say."""

    kind: str
    """A key of QUESTIONS."""
    name: str
    """Of a topic the comma-separated words by which one asks for it; else the qualified name."""
    text: str
    """Begins with the title or the signature, then an empty line."""


class Turn(msgspec.Struct, frozen=True):
    """One message of a chat, in the shape that the chat template takes."""

    role: str
    content: str


Sample = str | tuple[Turn, ...]
"""A plain text, or a chat."""


class Row(msgspec.Struct, frozen=True):
    """One line of a corpus file."""

    text: str
    """What the tokenizer reads; it puts <|bos|> before it and <|end|> after it."""
    kind: str
    """Of a whole document its own; else CHAT, or PART of a document."""
    name: str


def rows(documents: list[Document]) -> Iterator[Row]:
    """What is learned: greetings, then each document that is not held out, and its samples."""
    chance = random.Random(SEED)
    for _ in range(GREETINGS_LEARNED):
        yield Row(inner_text(_greeting(chance)), CHAT, "")
    for document in documents:
        if held_out(document):
            continue
        yield Row(document.text, document.kind, document.name)
        for sample in _samples(document, chance):
            if isinstance(sample, tuple):
                yield Row(inner_text(sample), CHAT, document.name)
            elif sample != document.text:
                yield Row(sample, PART, document.name)


def inner_text(turns: tuple[Turn, ...]) -> str:
    """What the chat template writes of a finished chat between its first and its last token."""
    return "<|end|>".join(f"<|{turn.role}|>{turn.content}" for turn in turns)


def write(documents: list[Document]) -> None:
    """Both files; the gzip header carries no time, so equal text gives equal bytes."""
    kept = (Row(each.text, each.kind, each.name) for each in documents if held_out(each))
    for path, lines in ((CORPUS_PATH, rows(documents)), (HELD_OUT_PATH, kept)):
        content = b"".join(msgspec.json.encode(line) + b"\n" for line in lines)
        path.write_bytes(gzip.compress(content, 9, mtime=0))


def read_rows(path: Path = CORPUS_PATH) -> list[Row]:
    """The lines of a file."""
    with gzip.open(path) as stream:
        return [msgspec.json.decode(line, type=Row) for line in stream]


def read() -> list[Document]:
    """All whole documents of the committed corpus, those that are learned first."""
    both = (*read_rows(CORPUS_PATH), *read_rows(HELD_OUT_PATH))
    return [Document(each.kind, each.name, each.text) for each in both if each.kind in QUESTIONS]


def held_out(document: Document) -> bool:
    """Whether the document serves to measure and is kept from training; topics never are."""
    return document.kind != "topic" and zlib.crc32(document.name.encode()) % HELD_OUT_ONE_IN == 0


def answer(document: Document) -> str | None:
    """The first prose of a document as one line, cut at a sentence; None where there is none."""
    said = ""
    for paragraph in document.text.split("\n\n")[1:]:
        line = " ".join(paragraph.split())
        listing = "\n " in paragraph or "::=" in paragraph or line[-1] not in ".:"
        if listing or not (line[0].isalpha() or line[0] in "\"'"):
            if said:
                break
            continue
        if said and len(said) + len(line) > ANSWER_CHARS_MAX // 2:
            break
        said = f"{said} {line}".strip()
    while len(said) > ANSWER_CHARS_MAX and ". " in said[:-1]:
        said = said[:-1].rpartition(". ")[0] + "."
    if said.endswith(":"):  # What would follow is an example or a list.
        kept, _, lead = said.rpartition(". ")
        said = f"{kept}." if kept else lead.rstrip(":") + "."
    return said or None


def _asked_names(document: Document) -> list[str]:
    if document.kind == "topic":
        return document.name.split(",")
    if any(part.startswith("_") for part in document.name.split(".")):
        return []
    names = [document.name]
    if document.name.startswith("builtins."):
        bare = document.name.removeprefix("builtins.")
        names = [bare, f"a {bare}"] if document.kind == "class" and bare.islower() else [bare, bare]
    return [name for name in names if len(name) <= QUESTION_NAME_CHARS_MAX]


def _plain(document: Document, chance: random.Random) -> str:
    # Half of the texts begin within the document, so that a prompt need not be a title.
    paragraphs = document.text.split("\n\n")
    start = 0 if chance.random() < 0.5 else chance.randrange(len(paragraphs))
    return "\n\n".join(paragraphs[start:])


def _greeting(chance: random.Random) -> tuple[Turn, Turn]:
    asked, said = chance.choice(GREETINGS)
    return Turn("user", chance.choice(asked)), Turn("assistant", said)


def _chat(document: Document, said: str, names: list[str], chance: random.Random) -> Sample:
    question = chance.choice(QUESTIONS[document.kind]).format(chance.choice(names))
    turns: tuple[Turn, ...] = (Turn("user", question), Turn("assistant", said))
    if chance.random() < 0.08:
        turns = (*_greeting(chance), *turns)
    if chance.random() < 0.10:
        turns = (Turn("system", chance.choice(SYSTEM_PROMPTS)), *turns)
    return turns


def _samples(document: Document, chance: random.Random) -> Iterator[Sample]:
    yield _plain(document, chance)
    if document.kind == "topic":
        yield document.text
    names, said = _asked_names(document), answer(document)
    if names and said:
        # What people ask for most is known by several words, and learnt once for each.
        yield from (_chat(document, said, [name], chance) for name in names)


def epoch(documents: list[Document], *, seed: int, greetings: int) -> list[Sample]:
    """One pass over the documents that are not held out, each as text and, if it can, as a chat."""
    chance = random.Random(seed)
    samples: list[Sample] = [_greeting(chance) for _ in range(greetings)]
    for document in documents:
        if not held_out(document):
            samples.extend(_samples(document, chance))
    chance.shuffle(samples)
    return samples
