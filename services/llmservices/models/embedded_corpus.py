"""The text that the embedded model learns from, as documents and as questions with answers.

Owns the file format of `embedded_corpus.txt.gz` and everything made from it mechanically.
Invariant: the same file and the same seed give the same samples in the same order, and a document
that `held_out` names is in no sample.  Never reads anything but that one file.
"""

import gzip
import random
import zlib
from pathlib import Path

import msgspec

CORPUS_PATH = Path(__file__).parent / "embedded_corpus.txt.gz"
HEADER = "%% "
"""Begins the line before each document: kind, then name."""

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


def parse(corpus: str) -> list[Document]:
    """The documents of a corpus file's text, in the file's order."""
    documents = []
    for part in ("\n" + corpus).split("\n" + HEADER)[1:]:
        head, _, text = part.partition("\n")
        kind, _, name = head.partition(" ")
        documents.append(Document(kind=kind, name=name, text=text.strip("\n")))
    return documents


def render(documents: list[Document]) -> str:
    """The inverse of `parse`."""
    return "".join(f"{HEADER}{each.kind} {each.name}\n{each.text}\n\n" for each in documents)


def read(path: Path = CORPUS_PATH) -> list[Document]:
    """The committed corpus."""
    with gzip.open(path, "rt", encoding="utf-8") as stream:
        return parse(stream.read())


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


def epoch(documents: list[Document], *, seed: int, greetings: int) -> list[Sample]:
    """One pass over the documents that are not held out, each as text and, if it can, as a chat."""
    chance = random.Random(seed)
    samples: list[Sample] = [_greeting(chance) for _ in range(greetings)]
    for document in documents:
        if held_out(document):
            continue
        samples.append(_plain(document, chance))
        if document.kind == "topic":
            samples.append(document.text)
        names, said = _asked_names(document), answer(document)
        if names and said:
            # What people ask for most is known by several words, and learnt once for each.
            samples.extend(_chat(document, said, [name], chance) for name in names)
    chance.shuffle(samples)
    return samples
