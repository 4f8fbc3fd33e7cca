"""From columns to examples: which format rows have, and what they say in it.

Pure.  A format that does not follow from the columns is refused with their names, never guessed.
"""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Final, Literal

import msgspec
from llmproto.errors import RemoteError, invalid
from llmproto.recipes import DataRecipe

from llmservices.data.rows import (
    BadRow,
    Chat,
    Completion,
    Example,
    Labelled,
    Text,
    Turn,
    Values,
)

Task = Literal["generate", "classify", "regress"]

TEXT_COLUMNS: Final = ("text", "sentence", "content", "review")
LABEL_COLUMNS: Final = ("label", "labels", "class", "category", "target", "score", "sentiment")
PAIR_COLUMNS: Final = (
    ("sentence1", "sentence2"),
    ("text", "text_pair"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("text1", "text2"),
)
COMPLETION_COLUMNS: Final = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("question", "answer"),
    ("input", "output"),
)
ROLES: Final = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "system": "system",
}
"""How conversations of the ShareGPT kind name those who speak."""
TASK_FORMATS: Final[Mapping[str, tuple[str, ...]]] = {
    "generate": ("chat", "sharegpt", "alpaca", "prompt_completion", "text"),
    "classify": ("pairs", "classification"),
    "regress": ("pairs", "classification"),
}
NUMBERED: Final = "column"
"""How columns of a table without a header are called: column1, column2, ..."""


class Shape(msgspec.Struct, frozen=True):
    """A format and the columns that it is in."""

    format: str
    text: str | None = None
    pair: str | None = None
    label: str | None = None
    prompt: str | None = None
    completion: str | None = None
    messages: str | None = None
    input: str | None = None
    """Alpaca's optional third column."""


def detect(recipe: DataRecipe, columns: Collection[str], task: Task | None) -> Shape:
    """The shape of rows with these columns; INVALID that names them where none or several fit."""
    shapes = list(_candidates(recipe, columns))
    if recipe.format != "auto":
        shapes = [shape for shape in shapes if shape.format == recipe.format]
    allowed = TASK_FORMATS[task] if task is not None else None
    fitting = [shape for shape in shapes if allowed is None or shape.format in allowed]
    if len(fitting) > 1:
        fitting = _most_specific(fitting, task)
    if len(fitting) == 1:
        return fitting[0]
    found = ", ".join(sorted(columns)) or "none"
    wanted = "" if task is None else f" for the task {task}"
    if fitting:
        names = " and ".join(sorted(shape.format for shape in fitting))
        raise invalid(f"the columns {found} fit the formats {names}: name one with format = ...")
    asked = "" if recipe.format == "auto" else f' in the format "{recipe.format}"'
    raise invalid(
        f"cannot tell how to read the columns {found}{asked}{wanted}: name the columns (text, "
        "text_pair, label, prompt, completion or messages), or the format"
    )


def _candidates(recipe: DataRecipe, columns: Collection[str]) -> Iterable[Shape]:
    """Every shape that the columns allow, those that the recipe names first of all."""
    label = _named(recipe.label, columns) or _first(LABEL_COLUMNS, columns)
    messages = _named(recipe.messages, columns)
    if messages is not None:
        format = "sharegpt" if recipe.format == "sharegpt" else "chat"
        yield Shape(format, messages=messages)
        return
    prompt, completion = _named(recipe.prompt, columns), _named(recipe.completion, columns)
    if prompt is not None and completion is not None:
        yield Shape("prompt_completion", prompt=prompt, completion=completion)
        return
    text, pair = _named(recipe.text, columns), _named(recipe.text_pair, columns)
    if text is not None:
        if pair is not None:
            yield Shape("pairs", text=text, pair=pair, label=label)
            return
        if label is not None:
            yield Shape("classification", text=text, label=label)
        yield Shape("text", text=text)
        return
    yield from _by_custom(columns, label)
    yield from _numbered(columns)


def _by_custom(columns: Collection[str], label: str | None) -> Iterable[Shape]:
    """What the usual names of columns say."""
    if "messages" in columns:
        yield Shape("chat", messages="messages")
    if "conversations" in columns:
        yield Shape("sharegpt", messages="conversations")
    if "instruction" in columns and "output" in columns:
        third = "input" if "input" in columns else None
        yield Shape("alpaca", prompt="instruction", completion="output", input=third)
    for prompt, completion in COMPLETION_COLUMNS:
        if prompt in columns and completion in columns:
            yield Shape("prompt_completion", prompt=prompt, completion=completion)
    for first, second in PAIR_COLUMNS:
        if first in columns and second in columns:
            yield Shape("pairs", text=first, pair=second, label=label)
    text = _first(TEXT_COLUMNS, columns)
    if text is not None:
        if label is not None:
            yield Shape("classification", text=text, label=label)
        yield Shape("text", text=text)


def _numbered(columns: Collection[str]) -> Iterable[Shape]:
    """A table without a header: texts first, the label last."""
    first, second, third = (f"{NUMBERED}{number}" for number in (1, 2, 3))
    if set(columns) == {first, second}:
        yield Shape("classification", text=first, label=second)
    if set(columns) == {first, second, third}:
        yield Shape("pairs", text=first, pair=second, label=third)


def _most_specific(shapes: list[Shape], task: Task | None) -> list[Shape]:
    """Formats that say all that another says, and more, go before it."""
    formats = {shape.format for shape in shapes}
    hidden: set[str] = set()
    if "alpaca" in formats and any(shape.prompt == "input" for shape in shapes):
        hidden.add("prompt_completion")
    if "pairs" in formats:
        hidden.add("classification")
    if task is None and formats & {"classification", "pairs"}:
        hidden.add("text")
    return [shape for shape in shapes if shape.format not in hidden]


def _named(name: str | None, columns: Collection[str]) -> str | None:
    if name is not None and name not in columns:
        found = ", ".join(sorted(columns)) or "none"
        raise invalid(f"there is no column {name!r}; there are: {found}")
    return name


def _first(names: Iterable[str], columns: Collection[str]) -> str | None:
    return next((name for name in names if name in columns), None)


def example_of(shape: Shape, values: Values, task: Task | None) -> Example:
    """What a row says; BadRow where it is not of its format."""
    match shape.format:
        case "text":
            return Text(_string(values, shape.text))
        case "chat":
            return Chat(_turns(values, shape.messages, "role", "content"))
        case "sharegpt":
            return Chat(_turns(values, shape.messages, "from", "value"))
        case "alpaca" | "prompt_completion":
            return Completion(
                _string(values, shape.prompt),
                _string(values, shape.completion),
                _optional(values, shape.input),
                instruction=shape.format == "alpaca",
            )
        case "classification" | "pairs":
            return _labelled(shape, values, task)
        case _:
            raise AssertionError(shape.format)


def texts_of(example: Example) -> list[str]:
    """All that was written, in order."""
    match example:
        case Text():
            return [example.text]
        case Chat():
            return [turn.content for turn in example.turns]
        case Completion():
            return [example.prompt, example.input, example.completion]
        case Labelled():
            return [example.text, *([] if example.pair is None else [example.pair])]


def with_texts(example: Example, texts: Sequence[str]) -> Example:
    """The same with other texts, as many as `texts_of` gives."""
    match example:
        case Text():
            return Text(texts[0])
        case Chat():
            turns = zip(example.turns, texts, strict=True)
            return Chat(tuple(Turn(turn.role, text) for turn, text in turns))
        case Completion():
            return Completion(texts[0], texts[2], texts[1], example.instruction)
        case Labelled():
            pair = None if example.pair is None else texts[1]
            return Labelled(texts[0], pair, example.label, example.value)


def written(shape: Shape, values: Values, example: Example) -> Values:
    """A row with the texts of an example in place of its own; all other columns as they are."""
    match example:
        case Text():
            return values | {_column(shape.text): example.text}
        case Labelled():
            pair = {} if shape.pair is None else {shape.pair: example.pair}
            return values | {_column(shape.text): example.text} | pair
        case Chat():
            column = _column(shape.messages)
            said = values[column]
            assert isinstance(said, list)
            content = "value" if shape.format == "sharegpt" else "content"
            turns = zip(said, example.turns, strict=True)
            return values | {column: [turn | {content: new.content} for turn, new in turns]}
        case Completion():
            prompt, completion = _column(shape.prompt), _column(shape.completion)
            told = {prompt: example.prompt, completion: example.completion}
            return values | told | ({} if shape.input is None else {shape.input: example.input})


def _column(name: str | None) -> str:
    assert name is not None  # a shape has the columns of its format
    return name


def label_text(value: object) -> str:
    """A label's name: `1`, `1.0` and `"1"` are one."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, int | float | str):
        return str(value).strip()
    raise BadRow(f"a label is a text or a number, not {_kind(value)}")


def sorted_labels(labels: Iterable[str]) -> list[str]:
    """The order of ids: numbers by value, all else by letters."""
    found = list(labels)
    if all(label.lstrip("-").isdecimal() for label in found):
        return sorted(found, key=int)
    return sorted(found)


def _labelled(shape: Shape, values: Values, task: Task | None) -> Labelled:
    text = _string(values, shape.text)
    pair = None if shape.pair is None else _string(values, shape.pair)
    if shape.label is None:
        if task is not None:
            raise BadRow("it has no label")
        return Labelled(text, pair)
    given = values.get(shape.label)
    if given is None or given == "":
        raise BadRow(f"the label ({shape.label!r}) is missing")
    if task != "regress":
        return Labelled(text, pair, label_text(given))
    try:
        value = float(given) if isinstance(given, int | float | str) else math.nan
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise BadRow(f"the value ({shape.label!r}) must be a finite number, it is {given!r:.40}")
    return Labelled(text, pair, None, value)


def _turns(values: Values, column: str | None, role: str, content: str) -> tuple[Turn, ...]:
    messages = values.get(column or "")
    if not isinstance(messages, list) or not messages:
        raise BadRow(f"{column!r} must be a list of messages, it is {_kind(messages)}")
    turns = []
    for message in messages:
        if not isinstance(message, dict):
            raise BadRow(f"a message must be an object, it is {_kind(message)}")
        said = message.get(role)
        text = message.get(content)
        if not isinstance(said, str) or not isinstance(text, str):
            raise BadRow(f"a message needs {role!r} and {content!r} as text")
        if role == "from" and said not in ROLES:
            raise BadRow(f"nobody knows who {said!r} is; known are {', '.join(ROLES)}")
        turns.append(Turn(ROLES[said] if role == "from" else said, text))
    if not any(turn.role == "assistant" for turn in turns):
        raise BadRow("no message is the assistant's")
    return tuple(turns)


def _string(values: Values, column: str | None) -> str:
    value = values.get(column or "")
    if not isinstance(value, str):
        raise BadRow(f"{column!r} must be text, it is {_kind(value)}")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise BadRow(f"{column!r} is not Unicode: it has half a surrogate pair") from None
    return value


def _optional(values: Values, column: str | None) -> str:
    return "" if column is None or values.get(column) is None else _string(values, column)


def _kind(value: object) -> str:
    return "missing" if value is None else f"a {type(value).__name__}"


def no_rows(what: str, tally_dropped: Mapping[str, int]) -> RemoteError:
    """The refusal of data in which nothing is left."""
    reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(tally_dropped.items()))
    return invalid(f"{what} holds no rows" + (f" (dropped: {reasons})" if reasons else ""))
