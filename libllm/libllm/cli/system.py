"""What the command line needs of the world: a system that can be booted, reached and stopped.

The protocols are the seam: commands are written against them, `libllm.cli.real` is the world, tests
bring their own.  Nothing here is slow to import.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Literal, NoReturn, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from contextlib import AbstractContextManager
    from typing import Unpack

    from llmproto.data import DataAugment, DataClean, DataInspect, DataReport
    from llmproto.jobs import JobFound, JobRow
    from llmproto.models import DeploymentRow, ModelAdded, ModelRow
    from llmproto.operation import ProcessRow, Status, ThreadRow
    from llmproto.recipes import DataRecipe, Recipe
    from llmproto.tenants import KeyRow
    from llmproto.versions import Collected, Deploying, Saved, Verified, VersionRow

    from libllm.config import Home
    from libllm.jobs import JobResult
    from libllm.options import Messages, Options
    from libllm.results import Piece


class Streaming(Protocol):
    """Pieces of one choice as they come; reading raises RemoteError where it fails."""

    @property
    def model(self) -> str:
        """The resolved name of the model: of a deployment, the version's."""

    def __iter__(self) -> "Iterator[Piece]": ...

    def close(self) -> None:
        """Stop reading; cancels what is unfinished."""


class Running(Protocol):
    """A job, as `libllm.syncjobs.Job` is one."""

    @property
    def id(self) -> bytes: ...

    def row(self) -> "JobRow": ...

    def watch(self, after_step: int = 0) -> "Iterator[JobFound]":
        """What is new, until its end."""

    def result(self) -> "JobResult": ...

    def cancel(self) -> None: ...


class Operator(Protocol):
    """What commands ask of `libllm.Client`, with the rights of the home's owner.

    Everything raises RemoteError.
    """

    def generate(
        self, prompt: str, /, *, stream: Literal[True], **options: "Unpack[Options]"
    ) -> Streaming: ...

    def chat(
        self, messages: "Messages", /, *, stream: Literal[True], **options: "Unpack[Options]"
    ) -> Streaming: ...

    def status(self) -> "Status": ...

    def ps(self) -> "Sequence[ProcessRow]": ...

    def threads(self) -> "Sequence[ThreadRow]": ...

    def models(self) -> "Sequence[ModelRow]": ...

    def metrics(self) -> str: ...

    def add_model(self, path: Path, name: str | None, /) -> "ModelAdded": ...

    def remove_model(self, name: str, /) -> None: ...

    def load_model(self, name: str | None, /) -> None: ...

    def kill(self, target: str, /, *, signal: int) -> None: ...

    def cancel(self, thread: bytes, /) -> None: ...

    def suspend(self, thread: bytes, /) -> None: ...

    def resume_thread(self, thread: bytes, /) -> None: ...

    def renice(self, thread: bytes, priority: int, /, *, service_class: int | None) -> None: ...

    def train(self, recipe: "Recipe", /) -> Running: ...

    def evaluate(
        self,
        model: str,
        /,
        *,
        data: "Sequence[str] | DataRecipe",
        metrics: "Sequence[str]",
        output_tokens_max: int,
        record: bool,
    ) -> Running: ...

    def jobs(self) -> "Sequence[JobRow]": ...

    def job(self, job: str, /) -> Running: ...

    def data(self, message: "DataClean | DataAugment | DataInspect", /) -> "DataReport": ...

    def import_version(self, path: Path, name: str, /, *, base: str | None) -> "Saved": ...

    def export_version(self, reference: str, path: str, /, *, merge: bool) -> None: ...

    def versions(
        self, name: str | None, /, *, patience_s: float | None
    ) -> "Sequence[VersionRow]": ...

    def tag(self, reference: str, tag: str, /, *, expect: str | None) -> None: ...

    def untag(self, name: str, tag: str, /) -> None: ...

    def verify(self, reference: str | None, /) -> "Verified": ...

    def collect(self) -> "Collected": ...

    def deploy(
        self,
        reference: str,
        /,
        *,
        name: str | None,
        replicas: int,
        device: str | None,
        gate: str,
        wait: bool,
    ) -> "Deploying": ...

    def rollback(self, name: str, /, *, wait: bool) -> "Deploying": ...

    def undeploy(self, name: str, /) -> None: ...

    def deployments(self) -> "Sequence[DeploymentRow]": ...

    def keys(self) -> "Sequence[KeyRow]": ...

    def add_key(self, name: str, /, *, operator: bool) -> str: ...

    def remove_key(self, name: str, /) -> None: ...


class System(Protocol):
    """The system of a home, whether it runs or not."""

    def home(self, given: str | None) -> "Home":
        """The home that the option names, else the environment's."""

    def is_running(self, home: "Home") -> bool: ...

    def connect(self, home: "Home") -> "AbstractContextManager[Operator]":
        """RemoteError(UNAVAILABLE) where nothing runs."""

    def boot(self, home: "Home", *, timeout_s: float) -> bool:
        """Until it is ready; False where it ran already.  RemoteError with the reason otherwise."""

    def become(self, home: "Home") -> NoReturn:
        """Boot in the foreground, in the place of this process."""

    def stop(self, home: "Home") -> bool:
        """Until nothing of it is left; False where nothing ran."""

    def fetch(self, name: str, *, progress: bool) -> Path:
        """The folder of a model on the Hugging Face hub, downloaded if need be."""

    def input(self, prompt: str) -> str:
        """A line from the person at the terminal; EOFError at its end."""
