"""A store without versions: deploys entries of the model table, one after another, until done."""

from collections.abc import Callable
from typing import Final

import msgspec
from libllm.events import Answer, Call
from llmproto.base import Message
from llmproto.connection import Failed, Hello
from llmproto.models import ModelAdd, ModelAdded, ModelDeploy, ModelEntry

from libllm import events as session_events
from llmkernel.testkit.rig import MODEL, MS, OPERATOR_PROOF, SERVICE_PROOF
from llmkernel.testkit.world import Node, World

NAME: Final = "bot"
ENTRIES: Final = {
    f"{NAME}@{letter * 8}": msgspec.structs.replace(
        MODEL, name=f"{NAME}@{letter * 8}", digest=letter.encode() * 16, tokenizer=b"t" * 16
    )
    for letter in "abcdx"
}
BROKEN: Final = f"{NAME}@xxxxxxxx"
"""It cannot be loaded."""
PATIENCE_MS: Final = 30_000


def entry(name: str) -> ModelEntry:
    """What the tokenizer finds in a version's folder."""
    return ENTRIES[name]


class Asking(Node):
    """A peer that asks until it is answered, and hands the answer on."""

    def __init__(self, world: World, role: str, proof: bytes, then: Callable[..., None]) -> None:
        super().__init__(world, Hello(world.random.randbytes(16), role, proof))
        self._then = then
        self._asked: dict[int, Message] = {}
        self._calls = 0

    def ask(self, message: Message, target: str = "kernel") -> None:
        """`then` gets this message and its answer."""
        self._calls += 1
        self._asked[self._calls] = message
        deadline_ns = self.world.now_ns + PATIENCE_MS * MS
        call = Call(self._calls, message, target, deadline_ns=deadline_ns, wait_exhausted=True)
        self.feed(call)

    def took(self, effect: session_events.Effect) -> None:
        """Answers."""
        if isinstance(effect, Answer):
            self._then(self._asked.pop(effect.call), effect.message)


class FakeStore:
    """Adds the entry at the tokenizer (as init's store may), then tells the kernel."""

    def __init__(self, world: World) -> None:
        self.deployed: list[str] = []
        """What the kernel has recorded."""
        self._operator = Asking(world, "client", OPERATOR_PROOF, self._added)
        self._store = Asking(world, "store", SERVICE_PROOF, self._recorded)
        self._wanted: dict[str, ModelDeploy] = {}

    @property
    def serves(self) -> bool:
        """Somebody may ask for the name."""
        return any(model != BROKEN for model in self.deployed)

    def deploy(self, model: str, *, replicas: int = 1) -> None:
        """Let the name serve this; what cannot be loaded only where there is something before."""
        if model == BROKEN and not self.serves:
            return
        key = self._store.world.random.randbytes(16)
        self._wanted[model] = ModelDeploy(NAME, model, replicas, key=key)
        self._operator.ask(ModelAdd("/models/bot", model), "tokenizer")

    def _added(self, asked: ModelAdd, answer: Message) -> None:
        assert isinstance(answer, ModelAdded), answer
        self._store.ask(self._wanted[answer.name])

    def _recorded(self, asked: ModelDeploy, answer: Message) -> None:
        if isinstance(answer, Failed):
            # Another deploy came between, and took what was added out of the table.
            assert "add it first" in answer.detail, answer
        else:
            self.deployed.append(asked.model)
