"""Extracts the embedded model's corpus from the Python installation that runs it.

Owns the choice of what is documentation worth reading and its clean-up.  Reads sources through
`ast` and compiled modules through their `__doc__`; never runs the library's Python code for it.
The result depends on the Python version, so it is committed and not made when installing.
"""

import ast
import importlib
import inspect
import pydoc
import re
import sysconfig
from collections.abc import Iterator, Mapping
from itertools import takewhile
from pathlib import Path
from pydoc_data.topics import topics

from llmservices.models.embedded_corpus import Document

LEFT_OUT_PARTS = (
    "test tests idlelib turtledemo lib2to3 site-packages pydoc_data __pycache__ ensurepip _vendor "
    "encodings distutils ntpath nturl2path lib-dynload __phello__ __hello__ this antigravity "
    "sre_compile sre_constants sre_parse"
)
"""Path parts that hold tests, demonstrations, fixtures, tables or copies."""

PUBLIC_NAMES = {
    "posixpath": "os.path",
    "genericpath": "os.path",
    "posix": "os",
    "_collections_abc": "collections.abc",
    "_pydecimal": "decimal",
    "_pyio": "io",
    "_weakrefset": "weakref",
    "_strptime": "time",
}
"""By which name people know what a module defines; else leading underscores go."""

COMPILED_MODULES = (
    "builtins math itertools time sys posix _collections _functools _io _operator _struct _socket "
    "_datetime _csv _thread _random _bisect _heapq _signal _contextvars _asyncio _queue _sqlite3 "
    "_ssl _hashlib array atexit binascii cmath fcntl faulthandler gc grp marshal mmap pwd resource "
    "select termios unicodedata zlib pyexpat _elementtree _decimal _lzma _bz2 readline"
)

STRAIGHT = str.maketrans(
    {"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2013": "-", "\u2014": "-"}
    | {"\u2026": "...", "\u00a0": " ", "\t": "    ", "\f": ""}
)
TEXT_CHARS_MIN = 24
WRAPPED_CHARS_MIN = 45
SIGNATURE_CHARS_MAX = 90

Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def _without_examples(paragraph: str) -> str:
    lines = paragraph.split("\n")
    return "\n".join(takewhile(lambda line: not line.lstrip().startswith(">>>"), lines))


def _unwrapped(paragraph: str) -> str:
    """Prose as one line; lists, tables and code as they are."""
    lines = paragraph.split("\n")
    indent = len(lines[0]) - len(lines[0].lstrip())
    flush = all(len(line) - len(line.lstrip()) == indent for line in lines)
    plain = all(re.match(r"[A-Za-z\"'`(\[0-9]|\*\S", line.strip()) for line in lines)
    full = all(len(line) >= WRAPPED_CHARS_MIN for line in lines[:-1])
    if not (flush and plain and full) or any("  " in line.strip() for line in lines):
        return paragraph
    return " " * indent + " ".join(line.strip() for line in lines)


def cleaned(text: str) -> str:
    """Documentation as paragraphs of plain text: no doctests, no hard wraps, straight quotes."""
    text = re.sub(r"(?<=[.!?:,])  (?=\S)", " ", inspect.cleandoc(text.translate(STRAIGHT)))
    text = re.sub(r"[ ]+$", "", text, flags=re.MULTILINE)
    text = re.sub(r"(?<!\S)\*(\w[\w -]*)\*(?!\w)", r"\1", text)  # Markup for emphasis.
    paragraphs = (_without_examples(part) for part in re.split(r"\n{2,}", text))
    return "\n\n".join(_unwrapped(part.strip("\n")) for part in paragraphs if part.strip())


def _targets(table: Mapping[str, str | tuple[str, ...]]) -> Iterator[tuple[str, tuple[str, ...]]]:
    for word, target in table.items():
        yield word, target if isinstance(target, tuple) else (target,)


def _topic_words() -> dict[str, list[str]]:
    """The words under which Python's own `help` finds each topic, as one would ask for them."""
    asked: dict[str, list[str]] = {name: [] for name in topics}
    for word, (name, *_) in _targets(pydoc.Helper.keywords):
        if name in asked and word.isalpha():
            asked[name] += [f"`{word}`", word, f"the {word} statement", f"`{word}` statements"]
    for word, (name, *_) in _targets(pydoc.Helper.topics):
        if name in asked:
            asked[name].append(word.lower())
    for name, words in asked.items():
        if not words:
            words.append(name.replace("-", " "))
    return asked


def topic_documents() -> Iterator[Document]:
    """The language reference, one document for each topic of Python's `help`."""
    for name, words in sorted(_topic_words().items()):
        title, _, body = topics[name].translate(STRAIGHT).partition("\n")
        title = title.replace('"', "")
        body = re.sub(r"^([*=\-~^])\1{3,}$", "", body, flags=re.MULTILINE)
        yield Document("topic", ",".join(words), f"{title}\n\n{cleaned(body)}")


def _definitions(node: ast.AST, prefix: str) -> Iterator[tuple[str, Definition]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Definition):
            yield f"{prefix}.{child.name}", child
            if isinstance(child, ast.ClassDef):
                yield from _definitions(child, f"{prefix}.{child.name}")
        elif isinstance(child, ast.If | ast.Try):
            yield from _definitions(child, prefix)


def _signature(node: Definition) -> str:
    if isinstance(node, ast.ClassDef):
        return ""
    said = re.sub(r"^(self|cls)(, |$)", "", ast.unparse(node.args))
    return f"({said})" if len(said) <= SIGNATURE_CHARS_MAX else "(...)"


def _public(module: str) -> str:
    first, _, rest = module.partition(".")
    first = PUBLIC_NAMES.get(first, first.lstrip("_"))
    return f"{first}.{rest}" if rest else first


def source_documents(library: Path) -> Iterator[Document]:
    """The docstrings of the standard library's sources."""
    left_out = set(LEFT_OUT_PARTS.split())
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).with_suffix("").parts
        if left_out & set(parts) or parts[0].startswith(("_sysconfigdata", "config-")):
            continue
        module = _public(".".join(part for part in parts if part != "__init__"))
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if said := ast.get_docstring(tree):
            yield Document("module", module, f"Module {module}\n\n{cleaned(said)}")
        for name, node in _definitions(tree, module):
            if said := ast.get_docstring(node):
                kind = "class" if isinstance(node, ast.ClassDef) else "function"
                head = f"class {name}" if kind == "class" else name + _signature(node)
                yield Document(kind, name, f"{head}\n\n{cleaned(said)}")


def _members(owner: object, prefix: str) -> Iterator[Document]:
    for name, member in sorted(vars(owner).items()):
        said = member.__doc__ if callable(member) or inspect.isdatadescriptor(member) else None
        if name.startswith("_") or not isinstance(said, str):
            continue
        kind = "class" if isinstance(member, type) else "function"
        head = f"class {prefix}.{name}" if kind == "class" else f"{prefix}.{name}"
        yield Document(kind, f"{prefix}.{name}", f"{head}\n\n{cleaned(said)}")
        if isinstance(member, type):
            yield from _members(member, f"{prefix}.{name}")


def compiled_documents() -> Iterator[Document]:
    """The docstrings of the modules that are written in C, as far as this Python has them."""
    for name in COMPILED_MODULES.split():
        try:
            module = importlib.import_module(name)
        except ImportError:
            continue
        yield from _members(module, _public(name))


def extract() -> list[Document]:
    """All documents, each name and each body once, in an order that depends on nothing else."""
    library = Path(sysconfig.get_path("stdlib"))
    chosen: list[Document] = []
    seen: set[str] = set()
    for document in (*topic_documents(), *compiled_documents(), *source_documents(library)):
        body = document.text.partition("\n\n")[2]
        long_enough = len(body) >= TEXT_CHARS_MIN and body.count(" ") >= 3
        if long_enough and not {document.name, body} & seen:
            seen |= {document.name, body}
            chosen.append(document)
    return chosen
