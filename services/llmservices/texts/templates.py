"""Chat templates: a model's own Jinja program, run in a sandbox with bounded work and output.

Renders what `transformers` renders for the same folder.  A template is part of a model that an
operator added, not of a request; the bounds are there so that a broken one refuses its request and
harms nobody else's.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime
from typing import Any, Final, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer
from llmproto.errors import invalid
from llmproto.generation import ChatMessage

from llmservices.texts import bounds

STEPS_MAX: Final = 1_000_000  # turns of loops and calls of macros in one rendering: about a second
MACRO_STEPS: Final = 16  # what a call of a macro costs against a turn of a loop


class Counted(NodeTransformer):
    """Rewrites a template so that each turn of a loop, each macro call and each `~` is accounted
    for.
    """

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = _call("counted", [_expression(node.iter)], node.lineno)
        if node.recursive:
            node.body.insert(0, _step(node.lineno))
        return node

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:
        self.generic_visit(node)
        node.body.insert(0, _step(node.lineno, MACRO_STEPS))
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _call("joined", node.nodes, node.lineno)


def _call(name: str, arguments: list[nodes.Expr], line: int) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute(name), arguments, [], None, None, lineno=line)


def _expression(node: nodes.Node) -> nodes.Expr:
    assert isinstance(node, nodes.Expr)  # what a loop goes over; Jinja types it wider
    return node


def _step(line: int, count: int = 1) -> nodes.Stmt:
    return nodes.ExprStmt(_call("step", [nodes.Const(count)], line), lineno=line)


class GenerationBlock(Extension):
    """`{% generation %}` marks what the assistant wrote, for training; here it is its content."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The statements between the tags."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class PlainNamespace(Namespace):
    """A namespace whose attributes cannot reach into Python."""

    def __setitem__(self, name: str, value: object) -> None:
        if name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace has no attribute {name!r}")
        super().__setitem__(name, value)


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """A sandbox that counts.  Invariant: `steps` is what the rendering in progress may still do."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, GenerationBlock]
        )
        self.steps = STEPS_MAX
        # The code that Jinja generates joins its output with this.
        self.concat = self.bounded_join  # type: ignore[method-assign]
        self.filters |= bounds.FILTERS
        for name in ("wordwrap", "urlize"):  # they can repeat an argument without bound
            del self.filters[name]
        self.globals = {
            "range": self.globals["range"],
            "cycler": self.globals["cycler"],
            "joiner": self.globals["joiner"],
            "dict": dict,
            "namespace": PlainNamespace,
            "raise_exception": _raise_exception,
        }

    def step(self, count: int = 1) -> None:
        """One more turn or call."""
        self.steps -= count
        if self.steps < 0:
            raise bounds.Bound(f"it takes more than {STEPS_MAX} steps")

    def counted(self, items: Iterable[Any]) -> Iterator[Any]:  # Any: whatever a template loops over
        """The items, each a step."""
        for item in items:
            self.step()
            yield item

    def joined(self, *parts: object) -> str:
        """The operator `~`."""
        return self.bounded_join(map(str, parts))

    def bounded_join(self, parts: Iterable[str]) -> str:
        """The parts together, unless they are too long."""
        kept: list[str] = []
        characters = 0
        for part in parts:
            characters += len(part)
            bounds.bounded(characters)
            kept.append(part)
        return "".join(kept)

    def call_binop(
        self, context: Any, operator: str, left: Any, right: Any
    ) -> Any:  # Any: Jinja's signature
        """One of the operators that can make much of little."""
        bounds.check_binop(operator, left, right)
        return super().call_binop(context, operator, left, right)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:  # Any: Jinja's signature
        """A string's `format`, checked where it is looked up: what Jinja makes of it hides it."""
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None

        def checked(*values: Any, **named: Any) -> str:  # Any: Jinja's signature
            bounds.check_format(value.__self__, "{", (*values, *named.values()))
            return str(wrapped(*values, **named))

        return checked

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """A call of anything; methods of strings that can make much of little are checked first."""
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, str):
            bounds.check_method(owner, __obj.__name__, args)
        return super().call(__context, __obj, *args, **kwargs)


class ChatTemplate:
    """One compiled template.  Not for several threads at once: the steps are counted in it."""

    def __init__(self, source: str, named: dict[str, str]) -> None:
        self._environment = BoundedEnvironment()
        self._named = named
        try:
            tree = Counted().visit(self._environment.parse(source))
            code = self._environment.compile(tree)
        except (jinja2.TemplateError, RecursionError) as error:
            raise invalid(f"the model's chat template does not compile: {_short(error)}") from error
        self._template = jinja2.Template.from_code(
            self._environment, code, dict(self._environment.globals)
        )

    def render(
        self, messages: Sequence[ChatMessage], *, now: datetime, add_generation_prompt: bool = True
    ) -> str:
        """The text of a chat.  `now` is what `strftime_now` formats."""
        self._environment.steps = STEPS_MAX
        chat = [{"role": message.role, "content": message.content} for message in messages]
        parts: list[str] = []
        characters = 0
        try:
            for part in self._template.generate(
                messages=chat,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                strftime_now=now.strftime,
                **self._named,
            ):
                characters += len(part)
                bounds.bounded(characters)
                parts.append(part)
        except bounds.Bound as error:
            raise invalid(f"the model's chat template was stopped: {error}") from error
        except jinja2.TemplateError as error:
            raise invalid(
                f"the model's chat template refuses this chat: {_short(error)}"
            ) from error
        except (
            ArithmeticError,
            LookupError,
            TypeError,
            ValueError,
            AttributeError,
            RecursionError,
            MemoryError,
        ) as error:
            raise invalid(
                f"the model's chat template fails on this chat: {_short(error)}"
            ) from error
        return "".join(parts)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _short(error: BaseException) -> str:
    """Its message, cut to what a detail holds."""
    text = str(error) or type(error).__name__
    return text if len(text) < 1000 else text[:1000] + " ..."
