"""The synchronous client: the same methods as the asynchronous one, for programs without an event
loop.

Its session lives on an event loop in a thread of its own, so that heartbeats go on whatever the
program does.
"""

from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Literal, TypeVar, Unpack, overload

from llmproto.base import Message
from llmproto.data import DataAugment, DataClean, DataInspect, DataReport
from llmproto.jobs import JobRow
from llmproto.models import DeploymentRow, ModelAdded, ModelRow
from llmproto.operation import ProcessRow, Status, ThreadRow
from llmproto.recipes import DataRecipe, Recipe
from llmproto.tenants import KeyRow
from llmproto.versions import Collected, Deploying, Saved, Verified, VersionRow

from libllm.client import AsyncClient, connect_async
from libllm.connection import CONNECT_S
from libllm.generation import Generation
from libllm.loopthread import LoopThread
from libllm.options import Messages, Options
from libllm.plugins import Kinds
from libllm.port import Reply
from libllm.recipes import Flags, Paths
from libllm.results import Completion, Piece
from libllm.syncjobs import Job
from libllm.vectors import Classification, Embeddings
from libllm.versions import ANY_TAG

MessageT = TypeVar("MessageT", bound=Message)


class Pieces(Iterator[Piece]):
    """The pieces of all choices, as they come.

    Closing it early (`close`, leaving a `with`, or forgetting it) cancels what is unfinished. What
    is not read holds up its own threads and nothing else.
    """

    def __init__(self, loop: LoopThread, generation: Generation) -> None:
        self._loop = loop
        self._generation = generation
        self._pieces = self._read()

    @property
    def streams(self) -> tuple[bytes, ...]:
        """Ids of the streams, by choice, for `resume`."""
        return self._generation.streams

    @property
    def threads(self) -> tuple[bytes, ...]:
        """Ids of the threads, by choice."""
        return self._generation.threads

    @property
    def model(self) -> str:
        """The resolved name of the model."""
        return self._generation.model

    def __iter__(self) -> "Pieces":
        return self

    def __next__(self) -> Piece:
        return next(self._pieces)

    def __enter__(self) -> "Pieces":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop reading; cancels what is unfinished."""
        self._pieces.close()
        self._loop.run(self._generation.aclose())

    def detach(self) -> list[tuple[bytes, int]]:
        """Stop reading without cancelling; gives stream and offset of each unfinished choice, for
        `resume`."""

        async def detach() -> list[tuple[bytes, int]]:
            return self._generation.detach()

        return self._loop.run(detach())

    def _read(self) -> Generator[Piece, None, None]:
        """One hop to the session's thread fetches all that is there; the next hop acknowledges
        it."""
        try:
            while pieces := self._loop.run(self._generation.take()):
                yield from pieces
        except GeneratorExit:
            self._loop.begin(self._generation.aclose())
            raise


class Client:
    """One session with a system; its methods may be called from any thread.

    Every method does what its namesake of AsyncClient does.
    """

    def __init__(self, loop: LoopThread, client: AsyncClient) -> None:
        """Made by `connect`."""
        self._loop = loop
        self._client = client
        self._is_closed = False

    def close(self) -> None:
        """Say goodbye; cancels what was not read, but for resumable streams."""
        if not self._is_closed:
            self._is_closed = True
            self._loop.run(self._client.aclose())
            self._loop.stop()

    def __enter__(self) -> "Client":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @overload
    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        stream: Literal[False] = False,
        **options: Unpack[Options],
    ) -> Completion: ...

    @overload
    def generate(
        self, prompt: str | Sequence[int], *, stream: Literal[True], **options: Unpack[Options]
    ) -> Pieces: ...

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        stream: bool = False,
        **options: Unpack[Options],
    ) -> Completion | Pieces:
        """Continue a text, or token ids; with `stream` an iterator of Pieces. See
        libllm.options.Options."""
        if stream:
            generation = self._loop.run(self._client.generate(prompt, stream=True, **options))
            return Pieces(self._loop, generation)
        return self._loop.run(self._client.generate(prompt, **options))

    @overload
    def chat(
        self, messages: Messages, *, stream: Literal[False] = False, **options: Unpack[Options]
    ) -> Completion: ...

    @overload
    def chat(
        self, messages: Messages, *, stream: Literal[True], **options: Unpack[Options]
    ) -> Pieces: ...

    def chat(
        self, messages: Messages, *, stream: bool = False, **options: Unpack[Options]
    ) -> Completion | Pieces:
        """Answer the last turn of a chat; with `stream` an iterator of Pieces."""
        if stream:
            generation = self._loop.run(self._client.chat(messages, stream=True, **options))
            return Pieces(self._loop, generation)
        return self._loop.run(self._client.chat(messages, **options))

    def resume(
        self,
        stream: bytes | str,
        offset: int = 0,
        *,
        scores: int = 0,
        deadline_s: float | None = None,
    ) -> Pieces:
        """Read on in a stream from a byte offset: a Piece's `stream` and `offset`."""
        generation = self._loop.run(
            self._client.resume(stream, offset, scores=scores, deadline_s=deadline_s)
        )
        return Pieces(self._loop, generation)

    def tokenize(
        self, text: str | None = None, *, messages: Messages | None = None, model: str | None = None
    ) -> list[int]:
        """The token ids that a prompt, or a chat, becomes."""
        return self._loop.run(self._client.tokenize(text, messages=messages, model=model))

    def embed(
        self,
        texts: str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]],
        *,
        model: str | None = None,
        truncate: bool = False,
        dimensions: int | None = None,
        priority: int = 0,
        service_class: int = 1,
        deadline_s: float | None = None,
        wait: bool = False,
    ) -> Embeddings:
        """A vector for each text (or list of token ids), as the model's folder makes them."""
        return self._loop.run(
            self._client.embed(
                texts,
                model=model,
                truncate=truncate,
                dimensions=dimensions,
                priority=priority,
                service_class=service_class,
                deadline_s=deadline_s,
                wait=wait,
            )
        )

    def classify(
        self,
        texts: str | Sequence[str],
        *,
        model: str | None = None,
        pairs: str | Sequence[str] | None = None,
        truncate: bool = False,
        priority: int = 0,
        service_class: int = 1,
        deadline_s: float | None = None,
        wait: bool = False,
    ) -> list[Classification]:
        """What a classifier (or a regression) says of each text, or of each pair of texts."""
        return self._loop.run(
            self._client.classify(
                texts,
                model=model,
                pairs=pairs,
                truncate=truncate,
                priority=priority,
                service_class=service_class,
                deadline_s=deadline_s,
                wait=wait,
            )
        )

    def ps(self) -> list[ProcessRow]:
        """The system's processes."""
        return self._loop.run(self._client.ps())

    def threads(self, limit: int = 1024) -> list[ThreadRow]:
        """This tenant's threads (an operator's: all), the youngest first."""
        return self._loop.run(self._client.threads(limit))

    def models(self) -> list[ModelRow]:
        """The model table."""
        return self._loop.run(self._client.models())

    def status(self) -> Status:
        """How the system is."""
        return self._loop.run(self._client.status())

    def metrics(self) -> str:
        """All measurements, in Prometheus' text format."""
        return self._loop.run(self._client.metrics())

    def add_model(self, path: str | Path, name: str | None = None) -> ModelAdded:
        """Put a Hugging Face folder into the model table; an operator's right."""
        return self._loop.run(self._client.add_model(path, name))

    def remove_model(self, name: str) -> None:
        """Take a model out of the table; its threads go on to their end."""
        self._loop.run(self._client.remove_model(name))

    def load_model(self, name: str | None = None) -> None:
        """Begin loading now, before the first thread needs it."""
        self._loop.run(self._client.load_model(name))

    def kill(self, target: bytes | str, *, signal: int = 9) -> None:
        """Signal a process by its name, or cancel a thread by its id."""
        self._loop.run(self._client.kill(target, signal=signal))

    def cancel(self, thread: bytes | str, *, forget: bool = False) -> None:
        """End a thread within a step.  `forget`: nobody will resume it."""
        self._loop.run(self._client.cancel(thread, forget=forget))

    def suspend(self, thread: bytes | str) -> None:
        """Take a thread off its device; its context stays."""
        self._loop.run(self._client.suspend(thread))

    def resume_thread(self, thread: bytes | str) -> None:
        """Undo `suspend`."""
        self._loop.run(self._client.resume_thread(thread))

    def renice(
        self, thread: bytes | str, priority: int, *, service_class: int | None = None
    ) -> None:
        """Change a thread's priority, -8 to 7: higher runs first within its class."""
        self._loop.run(self._client.renice(thread, priority, service_class=service_class))

    def shutdown(self) -> None:
        """Stop the whole system; accepted threads go on at its next boot."""
        self._loop.run(self._client.shutdown())

    def train(self, recipe: Recipe | str | Path | None = None, **flags: Unpack[Flags]) -> Job:
        """Start training, by a recipe (a struct, or the path of a recipe.toml), by flags, or by a
        file with flags over it; see `libllm.recipes.Flags`."""
        return Job(self._loop, self._loop.run(self._client.train(recipe, **flags)))

    def evaluate(
        self,
        model: str,
        *,
        data: Paths | DataRecipe,
        metrics: Sequence[str],
        output_tokens_max: int = 256,
        record: bool = True,
    ) -> Job:
        """Start judging a model on data by metrics."""
        asked = self._client.evaluate(
            model, data=data, metrics=metrics, output_tokens_max=output_tokens_max, record=record
        )
        return Job(self._loop, self._loop.run(asked))

    def jobs(self) -> list[JobRow]:
        """The living jobs, and those that ended within the last hours."""
        return self._loop.run(self._client.jobs())

    def job(self, job: bytes | str) -> Job:
        """A job by its id."""
        return Job(self._loop, self._loop.run(self._client.job(job)))

    def data(self, message: DataClean | DataAugment | DataInspect) -> DataReport:
        """Clean, augment or inspect data files; an operator's right."""
        return self._loop.run(self._client.data(message))

    def import_version(self, path: str | Path, name: str, *, base: str | None = None) -> Saved:
        """Copy a Hugging Face folder into the store, as a version of this name; a peft adapter on
        its `base`."""
        return self._loop.run(self._client.import_version(path, name, base=base))

    def export_version(self, reference: str, path: str | Path, *, merge: bool = True) -> None:
        """Write a version as a plain folder; an adapter merged into its base, or (`merge` false)
        alone."""
        self._loop.run(self._client.export_version(reference, path, merge=merge))

    def versions(
        self,
        name: str | None = None,
        *,
        checkpoints: bool = False,
        limit: int = 200,
        patience_s: float | None = None,
    ) -> list[VersionRow]:
        """The versions of a name, or all, newest first."""
        return self._loop.run(
            self._client.versions(name, checkpoints=checkpoints, limit=limit, patience_s=patience_s)
        )

    def version(self, reference: str) -> VersionRow:
        """One version, with its files; INVALID names what there is."""
        return self._loop.run(self._client.version(reference))

    def tag(self, reference: str, tag: str, *, expect: str | None = ANY_TAG) -> None:
        """Let a tag stand on a version.  With `expect` only if it stands on that version now (None:
        on nothing); else STALE."""
        self._loop.run(self._client.tag(reference, tag, expect=expect))

    def untag(self, name: str, tag: str) -> None:
        """Remove a tag."""
        self._loop.run(self._client.untag(name, tag))

    def remove_version(self, reference: str) -> None:
        """Forget a version that is neither deployed nor tagged; its objects go with `collect`."""
        self._loop.run(self._client.remove_version(reference))

    def verify(self, reference: str | None = None) -> Verified:
        """Read and compare every object of a version, or of all."""
        return self._loop.run(self._client.verify(reference))

    def collect(self) -> Collected:
        """Remove what no version needs."""
        return self._loop.run(self._client.collect())

    def deploy(
        self,
        reference: str,
        *,
        name: str | None = None,
        replicas: int = 1,
        device: str | None = None,
        gate: str = "",
        wait: bool = True,
    ) -> Deploying:
        """Let a name (else the version's own) serve a version, if the gate (`accuracy>=0.87`) holds
        of its metrics.  Running threads go on where they are.  With `wait`, until it serves;
        INVALID where it cannot be loaded, and then the previous one serves on."""
        return self._loop.run(
            self._client.deploy(
                reference, name=name, replicas=replicas, device=device, gate=gate, wait=wait
            )
        )

    def rollback(self, name: str, *, wait: bool = True) -> Deploying:
        """Let a name serve what it served before, or else the parent of what it serves."""
        return self._loop.run(self._client.rollback(name, wait=wait))

    def undeploy(self, name: str) -> None:
        """Let a name serve nothing; its threads go on to their end."""
        self._loop.run(self._client.undeploy(name))

    def deployments(self) -> list[DeploymentRow]:
        """Every name that serves a version."""
        return self._loop.run(self._client.deployments())

    def call(
        self,
        service: str,
        message: Message,
        answer: type[MessageT],
        *,
        kinds: Kinds,
        deadline_s: float | None = None,
    ) -> MessageT:
        """Ask a plug-in service, whose table of kinds this is; repeated until it is answered."""
        return self._loop.run(
            self._client.call(service, message, answer, kinds=kinds, deadline_s=deadline_s)
        )

    def exchange(
        self,
        service: str,
        message: Message,
        answer: type[MessageT],
        *,
        kinds: Kinds,
        blobs: Sequence[bytes] = (),
        deadline_s: float | None = None,
    ) -> Reply[MessageT]:
        """As `call`, with raw bytes behind the message; gives those behind its answer too."""
        return self._loop.run(
            self._client.exchange(
                service, message, answer, kinds=kinds, blobs=blobs, deadline_s=deadline_s
            )
        )

    def add_key(self, name: str, *, operator: bool = False) -> str:
        """Make an API key and its tenant.  Gives the key's text, which is kept nowhere."""
        return self._loop.run(self._client.add_key(name, operator=operator))

    def remove_key(self, name: str) -> None:
        """No longer accept this key."""
        self._loop.run(self._client.remove_key(name))

    def keys(self) -> list[KeyRow]:
        """The accepted keys' names."""
        return self._loop.run(self._client.keys())


def connect(
    home: str | Path | None = None,
    *,
    start: bool = False,
    url: str | None = None,
    server_key: str | None = None,
    proof: bytes | None = None,
    connection: str | Path | None = None,
    timeout_s: float = CONNECT_S,
) -> Client:
    """Connect to the system of a home; see `libllm.client.connect_async`."""
    loop = LoopThread()
    try:
        client = loop.run(
            connect_async(
                home,
                start=start,
                url=url,
                server_key=server_key,
                proof=proof,
                connection=connection,
                timeout_s=timeout_s,
            )
        )
    except BaseException:
        loop.stop()
        raise
    return Client(loop, client)
