"""The asynchronous client: everything that can be asked of a system, as methods.

    async with await libllm.connect_async() as llm:
        completion = await llm.generate("Once upon a time", max_tokens=64)

Whatever dies inside the system, a call goes on until it is answered or its deadline passes; a
stream goes on where it stood. Failures are RemoteError, whose `kind` says what to do.
"""

import hashlib
import os
import secrets
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Literal, TypeVar, Unpack, overload

from llmproto.base import Message
from llmproto.data import DataAugment, DataClean, DataInspect, DataReport
from llmproto.errors import ErrorKind, RemoteError, invalid
from llmproto.generation import Generate, TokenizeAsk, Tokenized
from llmproto.jobs import JobRow
from llmproto.metrics import MetricsAsk, MetricsText
from llmproto.models import (
    DeploymentRow,
    ModelAdd,
    ModelAdded,
    ModelAsk,
    ModelEntry,
    ModelFound,
    ModelLoad,
    ModelRemove,
    ModelRow,
    Models,
    ModelsAsk,
)
from llmproto.operation import (
    Processes,
    ProcessesAsk,
    ProcessKill,
    ProcessRow,
    Shutdown,
    Status,
    StatusAsk,
    ThreadRow,
    Threads,
    ThreadsAsk,
)
from llmproto.recipes import DataRecipe, Recipe
from llmproto.tenants import (
    KeyAdd,
    KeyPresent,
    KeyPresented,
    KeyRemove,
    KeyRow,
    Keys,
    KeysAsk,
)
from llmproto.threads import Done, ThreadCancel, ThreadRenice, ThreadResume, ThreadSuspend
from llmproto.versions import Collected, Deploying, Saved, Verified, VersionRow

from libllm import boot
from libllm.config import Home
from libllm.connection import CONNECT_S, Connection, open_connection
from libllm.generation import Generation, open_generation, resume_generation
from libllm.jobs import AsyncJob, JobTable
from libllm.options import Messages, Options, to_generate, to_messages
from libllm.plugins import Kinds
from libllm.port import Port, Reply
from libllm.recipes import Flags, Paths
from libllm.remote import Remote
from libllm.results import Completion
from libllm.vectors import (
    Classification,
    Embeddings,
    Inputs,
    classifications,
    embeddings,
    encode_all,
    inputs_of,
)
from libllm.versions import ANY_TAG, VersionTable

PATIENCE_S: Final = 60.0
"""How long a question to a system in trouble is repeated before it fails with DEADLINE."""
KEY_PREFIX: Final = "llmos-"

MessageT = TypeVar("MessageT", bound=Message)


class AsyncClient:
    """One session with a system.

    May be used by many tasks of its event loop at once. Closing it cancels what it has not read,
    but for streams that are resumable.
    """

    def __init__(self, port: Port, *, patience_s: float = PATIENCE_S) -> None:
        """Speaks through this port: that of a connection (`connect_async`), or a service's own."""
        self._port = port
        self._patience_s = patience_s
        self._connection: Connection | None = None
        self._jobs = JobTable(self._ask)
        self._versions = VersionTable(self._ask)

    @classmethod
    def over(cls, connection: Connection, *, patience_s: float = PATIENCE_S) -> "AsyncClient":
        """A client that owns its connection."""
        client = cls(connection.port, patience_s=patience_s)
        client._connection = connection
        return client

    async def aclose(self) -> None:
        """Say goodbye."""
        if self._connection is not None:
            self._connection.close()

    async def __aenter__(self) -> "AsyncClient":
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    # --- text ----------------------------------------------------------------------------------

    @overload
    async def generate(
        self,
        prompt: str | Sequence[int],
        *,
        stream: Literal[False] = False,
        **options: Unpack[Options],
    ) -> Completion: ...

    @overload
    async def generate(
        self, prompt: str | Sequence[int], *, stream: Literal[True], **options: Unpack[Options]
    ) -> Generation: ...

    async def generate(
        self,
        prompt: str | Sequence[int],
        *,
        stream: bool = False,
        **options: Unpack[Options],
    ) -> Completion | Generation:
        """Continue a text, or token ids.

        Gives the Completion; with `stream` a Generation (an asynchronous iterator of Pieces), as
        soon as the system has accepted the request. Options: see `libllm.options.Options`.
        """
        if isinstance(prompt, str):
            message = to_generate(options, prompt=prompt)
        else:
            message = to_generate(options, tokens=prompt)
        return await self._generated(message, options, stream=stream)

    @overload
    async def chat(
        self, messages: Messages, *, stream: Literal[False] = False, **options: Unpack[Options]
    ) -> Completion: ...

    @overload
    async def chat(
        self, messages: Messages, *, stream: Literal[True], **options: Unpack[Options]
    ) -> Generation: ...

    async def chat(
        self, messages: Messages, *, stream: bool = False, **options: Unpack[Options]
    ) -> Completion | Generation:
        """Answer the last turn of a chat, as `generate` does; the model must have a chat
        template."""
        message = to_generate(options, messages=messages)
        return await self._generated(message, options, stream=stream)

    def start(
        self,
        generate: Generate,
        *,
        tenant: int | None = None,
        deadline_s: float | None = None,
        wait: bool = False,
    ) -> Generation:
        """Ask for exactly this, on behalf of a tenant whose key was presented; not yet accepted
        when it returns."""
        return open_generation(
            self._port,
            generate,
            tenant=tenant,
            deadline_ns=_deadline_ns(deadline_s),
            wait_exhausted=wait,
        )

    async def resume(
        self,
        stream: bytes | str,
        offset: int = 0,
        *,
        scores: int = 0,
        tenant: int | None = None,
        deadline_s: float | None = None,
    ) -> Generation:
        """Read on in a stream from a byte offset (a Piece's `stream` and `offset`; hexadecimal text
        will do).

        STALE where the system no longer has it.
        """
        generation = resume_generation(
            self._port,
            _id(stream, 17, "stream"),
            offset=offset,
            scores=scores,
            tenant=tenant,
            deadline_ns=_deadline_ns(deadline_s),
        )
        await generation.wait_accepted()
        return generation

    async def tokenize(
        self, text: str | None = None, *, messages: Messages | None = None, model: str | None = None
    ) -> list[int]:
        """The token ids that a prompt, or a chat, becomes."""
        turns = None if messages is None else to_messages(messages)
        ask = TokenizeAsk(model=model, prompt=text, messages=turns)
        return (await self._ask(ask, Tokenized, target="tokenizer")).tokens

    # --- vectors -------------------------------------------------------------------------------

    async def embed(
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
        tenant: int | None = None,
    ) -> Embeddings:
        """A vector for each text (or list of token ids), as the model's folder makes them.

        Longer inputs than the model takes are INVALID, unless `truncate` allows to cut them.
        `dimensions`: keep so many numbers of each vector, brought back to length 1.
        """
        found, tokens = inputs_of(texts)
        inputs = Inputs(
            texts=found,
            tokens=tokens,
            model=model,
            truncate=truncate,
            priority=priority,
            service_class=service_class,
        )
        parts = await encode_all(
            self._port, inputs, tenant=tenant, deadline_ns=_deadline_ns(deadline_s), wait=wait
        )
        return embeddings(parts, dimensions=dimensions)

    async def classify(
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
        tenant: int | None = None,
    ) -> list[Classification]:
        """What a classifier (or a regression) says of each text, or of each pair of texts."""
        first, _ = inputs_of(texts)
        second = None if pairs is None else inputs_of(pairs)[0]
        if first is None or (second is not None and len(second) != len(first)):
            raise invalid(f"{len(texts)} texts and {len(pairs or ())} pairs: give one for each")
        inputs = Inputs(
            texts=first,
            pairs=second,
            model=model,
            task="classify",
            truncate=truncate,
            priority=priority,
            service_class=service_class,
        )
        parts = await encode_all(
            self._port, inputs, tenant=tenant, deadline_ns=_deadline_ns(deadline_s), wait=wait
        )
        return classifications(parts)

    # --- looking -------------------------------------------------------------------------------

    async def ps(self) -> list[ProcessRow]:
        """The system's processes."""
        return (await self._ask(ProcessesAsk(), Processes)).rows

    async def threads(self, limit: int = 1024) -> list[ThreadRow]:
        """This tenant's threads (an operator's: all), the youngest first."""
        return (await self._ask(ThreadsAsk(limit=limit), Threads)).rows

    async def models(self) -> list[ModelRow]:
        """The model table."""
        return (await self._ask(ModelsAsk(), Models)).rows

    async def model(self, name: str | None = None, *, tenant: int | None = None) -> ModelEntry:
        """One entry of it; without a name the default model's."""
        return (await self._ask(ModelAsk(name), ModelFound, tenant=tenant)).model

    async def status(self) -> Status:
        """How the system is."""
        return await self._ask(StatusAsk(), Status)

    async def metrics(self) -> str:
        """All measurements, in Prometheus' text format."""
        return (await self._ask(MetricsAsk(), MetricsText, target="monitor")).text

    # --- acting --------------------------------------------------------------------------------

    async def add_model(self, path: str | Path, name: str | None = None) -> ModelAdded:
        """Put a Hugging Face folder into the model table; an operator's right."""
        ask = ModelAdd(path=os.path.abspath(path), name=name)
        return await self._ask(ask, ModelAdded, target="tokenizer")

    async def remove_model(self, name: str) -> None:
        """Take a model out of the table; its threads go on to their end."""
        await self._ask(ModelRemove(name), Done)

    async def load_model(self, name: str | None = None) -> None:
        """Begin loading now, before the first thread needs it."""
        await self._ask(ModelLoad(name), Done)

    async def kill(self, target: bytes | str, *, signal: int = 9) -> None:
        """Signal a process by its name, or cancel a thread by its id (8 bytes, or 16 hexadecimal
        digits)."""
        thread = _thread_or_none(target)
        if thread is not None:
            await self.cancel(thread)
            return
        assert isinstance(target, str)
        try:
            await self._ask(ProcessKill(name=target, signal=signal), Done, once=True)
        except RemoteError as error:
            # A kernel that was told to die may not come to answer.
            if error.kind is not ErrorKind.UNAVAILABLE or target != "kernel":
                raise

    async def cancel(self, thread: bytes | str, *, forget: bool = False) -> None:
        """End a thread within a step.  `forget`: nobody will resume it, so that nothing of it is
        kept from here on."""
        await self._ask(ThreadCancel(_id(thread, 8, "thread"), forget), Done)

    async def suspend(self, thread: bytes | str) -> None:
        """Take a thread off its device; its context stays."""
        await self._ask(ThreadSuspend(_id(thread, 8, "thread")), Done)

    async def resume_thread(self, thread: bytes | str) -> None:
        """Undo `suspend`."""
        await self._ask(ThreadResume(_id(thread, 8, "thread")), Done)

    async def renice(
        self, thread: bytes | str, priority: int, *, service_class: int | None = None
    ) -> None:
        """Change a thread's priority, -8 to 7: higher runs first within its class."""
        ask = ThreadRenice(_id(thread, 8, "thread"), priority, service_class)
        await self._ask(ask, Done)

    async def shutdown(self) -> None:
        """Stop the whole system; accepted threads go on at its next boot."""
        try:
            await self._ask(Shutdown(), Done, once=True)
        except RemoteError as error:
            if error.kind is not ErrorKind.UNAVAILABLE:
                raise

    # --- jobs ----------------------------------------------------------------------------------

    async def train(
        self, recipe: Recipe | str | Path | None = None, **flags: Unpack[Flags]
    ) -> AsyncJob:
        """Start training, by a recipe (a struct, or the path of a recipe.toml), by flags
        (`libllm.recipes.Flags`), or by a file with flags over it.

        Gives the Job as soon as the system has it for good: await it, or watch it.
        """
        return await self._jobs.train(recipe, flags)

    async def evaluate(
        self,
        model: str,
        *,
        data: Paths | DataRecipe,
        metrics: Sequence[str],
        output_tokens_max: int = 256,
        record: bool = True,
    ) -> AsyncJob:
        """Start judging a model (a name of the table, the reference of a version, or a folder) on
        data by metrics (`llmproto.recipes.METRICS`); with `record` the results belong to the
        version from then on."""
        return await self._jobs.evaluate(
            model, data, metrics, output_tokens_max=output_tokens_max, record=record
        )

    async def jobs(self) -> list[JobRow]:
        """The living jobs, and those that ended within the last hours."""
        return await self._jobs.jobs()

    async def job(self, job: bytes | str) -> AsyncJob:
        """A job by its id (8 bytes, or 16 hexadecimal digits); STALE where there is none."""
        return await self._jobs.job(job)

    async def data(self, message: DataClean | DataAugment | DataInspect) -> DataReport:
        """Clean, augment or inspect data files; an operator's right."""
        return await self._jobs.data(message)

    # --- versions ------------------------------------------------------------------------------

    async def import_version(
        self, path: str | Path, name: str, *, base: str | None = None
    ) -> Saved:
        """Copy a Hugging Face folder into the store, as a version of this name; a peft adapter on
        its `base`."""
        return await self._versions.import_version(path, name, base=base)

    async def export_version(self, reference: str, path: str | Path, *, merge: bool = True) -> None:
        """Write a version as a plain folder; an adapter merged into its base, or (`merge` false)
        alone."""
        await self._versions.export_version(reference, path, merge=merge)

    async def versions(
        self,
        name: str | None = None,
        *,
        checkpoints: bool = False,
        limit: int = 200,
        patience_s: float | None = None,
    ) -> list[VersionRow]:
        """The versions of a name, or all, newest first."""
        return await self._versions.versions(
            name, checkpoints=checkpoints, limit=limit, patience_s=patience_s
        )

    async def version(self, reference: str) -> VersionRow:
        """One version, with its files; INVALID names what there is."""
        return await self._versions.version(reference)

    async def tag(self, reference: str, tag: str, *, expect: str | None = ANY_TAG) -> None:
        """Let a tag stand on a version.  With `expect` only if it stands on that version now (None:
        on nothing); else STALE."""
        await self._versions.tag(reference, tag, expect=expect)

    async def untag(self, name: str, tag: str) -> None:
        """Remove a tag."""
        await self._versions.untag(name, tag)

    async def remove_version(self, reference: str) -> None:
        """Forget a version that is neither deployed nor tagged; its objects go with `collect`."""
        await self._versions.remove_version(reference)

    async def verify(self, reference: str | None = None) -> Verified:
        """Read and compare every object of a version, or of all."""
        return await self._versions.verify(reference)

    async def collect(self) -> Collected:
        """Remove what no version needs."""
        return await self._versions.collect()

    async def deploy(
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
        return await self._versions.deploy(
            reference, name=name, replicas=replicas, device=device, gate=gate, wait=wait
        )

    async def rollback(self, name: str, *, wait: bool = True) -> Deploying:
        """Let a name serve what it served before, or else the parent of what it serves."""
        return await self._versions.rollback(name, wait=wait)

    async def undeploy(self, name: str) -> None:
        """Let a name serve nothing; its threads go on to their end."""
        await self._versions.undeploy(name)

    async def deployments(self) -> list[DeploymentRow]:
        """Every name that serves a version."""
        return await self._versions.deployments()

    # --- plug-ins ------------------------------------------------------------------------------

    async def call(
        self,
        service: str,
        message: Message,
        answer: type[MessageT],
        *,
        kinds: Kinds,
        deadline_s: float | None = None,
    ) -> MessageT:
        """Ask a plug-in service, whose table of kinds this is; repeated until it is answered.

        UNAVAILABLE is waited out until the deadline (`patience_s` where none is given).
        """
        reply = await self.exchange(service, message, answer, kinds=kinds, deadline_s=deadline_s)
        return reply.message

    async def exchange(
        self,
        service: str,
        message: Message,
        answer: type[MessageT],
        *,
        kinds: Kinds,
        blobs: Sequence[bytes] = (),
        deadline_s: float | None = None,
    ) -> Reply[MessageT]:
        """As `call`, with raw bytes behind the message; gives those behind its answer too. All
        together at most MESSAGE_BYTES_MAX."""
        return await self._port.exchange(
            message,
            answer,
            target=service,
            blobs=blobs,
            kinds=kinds,
            deadline_ns=_deadline_ns(self._patience_s if deadline_s is None else deadline_s),
        )

    # --- keys ----------------------------------------------------------------------------------

    async def add_key(self, name: str, *, operator: bool = False) -> str:
        """Make an API key and its tenant.  Gives the key's text, which is kept nowhere."""
        key = KEY_PREFIX + secrets.token_urlsafe(32)
        digest = hashlib.sha256(key.encode()).digest()
        await self._ask(KeyAdd(name=name, digest=digest, operator=operator), Done)
        return key

    async def remove_key(self, name: str) -> None:
        """No longer accept this key."""
        await self._ask(KeyRemove(name), Done)

    async def keys(self) -> list[KeyRow]:
        """The accepted keys' names."""
        return (await self._ask(KeysAsk(), Keys)).rows

    async def present_key(self, key: str) -> KeyPresented:
        """For gateways: whose key is this? Gives the tenant's handle; DENIED for a key that nobody
        added."""
        data = key.encode(errors="replace")[:256]
        if not data:
            raise RemoteError(ErrorKind.DENIED, "no API key was given")
        return await self._ask(KeyPresent(data), KeyPresented)

    # --- inside --------------------------------------------------------------------------------

    async def _generated(
        self, message: Generate, options: Options, *, stream: bool
    ) -> Completion | Generation:
        generation = self.start(
            message, deadline_s=options.get("deadline_s"), wait=options.get("wait", False)
        )
        await generation.wait_accepted()
        return generation if stream else await generation.collect()

    async def _ask(
        self,
        message: Message,
        answer: type[MessageT],
        *,
        target: str = "kernel",
        tenant: int | None = None,
        once: bool = False,
        patience_s: float | None = None,
    ) -> MessageT:
        return await self._port.call(
            message,
            answer,
            target=target,
            tenant=tenant,
            deadline_ns=_deadline_ns(self._patience_s if patience_s is None else patience_s),
            once=once,
        )


async def connect_async(
    home: str | Path | None = None,
    *,
    start: bool = False,
    url: str | None = None,
    server_key: str | None = None,
    proof: bytes | None = None,
    connection: str | Path | None = None,
    timeout_s: float = CONNECT_S,
) -> AsyncClient:
    """Connect to the system of a home (default: $LLMOS_HOME, else ~/.llmos), as its operator.

    With `start` a system is booted where none runs; it stays until `llmos down`. UNAVAILABLE where
    nothing runs. A system on another machine is named by `url` (tcp://...), `server_key` and
    `proof`, or by `connection`: a copy of keys/connection.json of its home, which holds all three.
    """
    if connection is not None:
        remote = Remote.read(connection)
        url, server_key, proof = remote.url, remote.server_key, bytes.fromhex(remote.operator)
    place = Home.find(home)
    if start:
        await boot.boot_async(place)
    elif url is None and not boot.is_running(place):
        raise RemoteError(
            ErrorKind.UNAVAILABLE,
            f"no system runs in {place.root}: start one with `llmos up`, or connect(start=True)",
        )
    return await open_client(
        place, url=url, server_key=server_key, proof=proof, timeout_s=timeout_s
    )


async def open_client(
    home: Home,
    *,
    url: str | None = None,
    server_key: str | None = None,
    proof: bytes | None = None,
    timeout_s: float = CONNECT_S,
) -> AsyncClient:
    """Connect to a system that is taken to run."""
    connection = await open_connection(
        home, url=url, server_key=server_key, proof=proof, timeout_s=timeout_s
    )
    return AsyncClient.over(connection)


def _deadline_ns(seconds: float | None) -> int | None:
    return None if seconds is None else time.monotonic_ns() + int(seconds * 1e9)


def _id(given: bytes | str, size: int, what: str) -> bytes:
    """Bytes, or their hexadecimal text."""
    try:
        found = bytes.fromhex(given) if isinstance(given, str) else bytes(given)
    except ValueError:
        found = b""
    if len(found) != size:
        raise invalid(f"a {what} id has {size} bytes, or {2 * size} hexadecimal digits: {given!r}")
    return found


def _thread_or_none(target: bytes | str) -> bytes | None:
    if isinstance(target, bytes):
        return _id(target, 8, "thread")
    is_hex = len(target) == 16 and all(digit in "0123456789abcdefABCDEF" for digit in target)
    return bytes.fromhex(target) if is_hex else None
