"""A system that exists only as values, and the command line run against it."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, NoReturn, Unpack

import msgspec
import pytest
from libllm.cli.app import app
from libllm.config import Home
from libllm.jobs import JobResult, result_of
from libllm.options import Messages, Options
from libllm.results import Piece, Usage
from llmproto.data import DataAugment, DataClean, DataInspect, DataReport
from llmproto.errors import ErrorKind, RemoteError
from llmproto.generation import TextScore
from llmproto.jobs import JobFound, JobKind, JobRow, JobState
from llmproto.models import (
    DeploymentRow,
    DeploymentState,
    ModelAdded,
    ModelEntry,
    ModelRow,
    ModelState,
)
from llmproto.operation import (
    DeviceRow,
    Lease,
    ProcessRow,
    ProcessState,
    Status,
    ThreadRow,
    ThreadState,
)
from llmproto.recipes import DataRecipe, Recipe
from llmproto.tenants import KeyRow
from llmproto.versions import (
    Collected,
    Damage,
    Deploying,
    Lineage,
    Saved,
    Verified,
    VersionKind,
    VersionRow,
)
from typer.testing import CliRunner

THREAD = bytes.fromhex("0000000100000005")


def entry(name: str, path: str = "/models/x", *, chat: bool = False) -> ModelRow:
    """A row of the model table."""
    model = ModelEntry(
        name=name,
        path=path,
        digest=bytes(16),
        architecture="LlamaForCausalLM",
        context_tokens=512,
        vocabulary=512,
        weight_bytes=1_048_576,
        chat=chat,
    )
    return ModelRow(model=model, state=ModelState.READY, replicas=1, threads=0, default=False)


def process(name: str, role: str, pid: int, *, incarnation: int = 1) -> ProcessRow:
    """A row of ps."""
    return ProcessRow(
        name=name,
        role=role,
        pid=pid,
        state=ProcessState.READY,
        incarnation=incarnation,
        uptime_ms=62_000,
        lease=Lease(device="cpu", cores=[0, 1], memory_bytes=1 << 30) if pid == 12 else None,
        model="embedded" if role == "executor" else "",
        threads=1 if role == "executor" else 0,
        path="bfloat16 cpu native avx512_bf16 fast" if role == "executor" else "",
    )


class Pieces:
    """A stream of prepared pieces; what stands for an interruption or a failure is raised."""

    def __init__(self, script: Sequence[Piece | BaseException]) -> None:
        self._script = script
        self.closed = False
        self.model = "embedded"

    def __iter__(self) -> Iterator[Piece]:
        for step in self._script:
            if isinstance(step, BaseException):
                raise step
            yield step

    def close(self) -> None:
        self.closed = True


def pieces_of(*texts: str, scores: bool = False) -> Pieces:
    """A complete stream, one token a text."""
    made: list[Piece | BaseException] = []
    for number, text in enumerate(texts, 1):
        last = number == len(texts)
        made.append(
            Piece(
                text=text,
                tokens=number,
                stream=bytes(17),
                finish_reason="length" if last else None,
                usage=Usage(prompt_tokens=3, output_tokens=number) if last else None,
                scores=[TextScore(text=text, token=100 + number, logprob=-0.5)] if scores else None,
            )
        )
    return Pieces(made)


class Generation(NamedTuple):
    """What was asked for."""

    kind: str
    what: object
    options: Options


VERSION = VersionRow(
    version=bytes.fromhex("3f2a0b1c") + bytes(28),
    reference="bot@3f2a0b1c",
    name="bot",
    kind=VersionKind.MODEL,
    path="/home/store/versions/3f2a0b1c",
    created_s=0,
    bytes=3 << 20,
    bytes_own=1 << 20,
    tags=["prod"],
    lineage=Lineage(parent=bytes.fromhex("aabbccdd") + bytes(28)),
    metrics={"accuracy": 0.875},
)
DEPLOYED = DeploymentRow(
    name="bot",
    state=DeploymentState.LIVE,
    model=VERSION.reference,
    serving=VERSION.reference,
    previous="bot@00000001",
    replicas=1,
    replicas_ready=1,
)
JOB = bytes.fromhex("0000000100000007")
JOB_ROW = JobRow(
    job=JOB,
    kind=JobKind.TRAIN,
    name="bot",
    tenant="owner",
    state=JobState.RUNNING,
    step=2,
    steps_total=4,
    checkpoint=None,
    checkpoint_step=0,
    attempts=1,
    age_ms=61_000,
)


class FakeJob:
    """Implements libllm.cli.system.Running; plays prepared looks."""

    def __init__(self, looks: Sequence[JobFound | BaseException]) -> None:
        self.id = JOB
        self._looks = looks
        self._last = JOB_ROW

    def row(self) -> JobRow:
        return self._last

    def watch(self, after_step: int = 0) -> Iterator[JobFound]:
        for look in self._looks:
            if isinstance(look, BaseException):
                raise look
            self._last = look.row
            yield look

    def result(self) -> JobResult:
        return result_of(self._last)

    def cancel(self) -> None:
        raise AssertionError


class FakeOperator:
    """Implements libllm.cli.system.Operator; notes what was asked of it."""

    def __init__(self) -> None:
        self.asked: list[object] = []
        self.generations: list[Generation] = []
        self.streams: list[Pieces] = []
        """What the next generations give."""
        self.rows = [process("kernel", "kernel", 11), process("executor-1", "executor", 12)]
        self.table = [entry("embedded", chat=True), entry("plain", "/models/plain")]
        self.ready = True
        self.looks: list[JobFound | BaseException] = []
        """What is seen of the next job."""
        self.report = DataReport("text", 3, 2)
        self.damage: list[Damage] = []
        self.deployed = [DEPLOYED]
        self.store_down: RemoteError | None = None

    def generate(
        self, prompt: str, /, *, stream: Literal[True], **options: Unpack[Options]
    ) -> Pieces:
        self.generations.append(Generation("generate", prompt, options))
        return self.streams.pop(0)

    def chat(
        self, messages: Messages, /, *, stream: Literal[True], **options: Unpack[Options]
    ) -> Pieces:
        self.generations.append(Generation("chat", list(messages), options))
        return self.streams.pop(0)

    def status(self) -> Status:
        return Status(
            ready=self.ready,
            version="9.9.9",
            kernel_epoch=3,
            uptime_ms=5000,
            http="http://127.0.0.1:8750",
            default_model="embedded",
            journal_bytes=8 << 20,
            devices=[DeviceRow(name="cpu", kind="cpu", cores=[0, 1], memory_bytes=1 << 34)],
            not_ready=[] if self.ready else ["gateway: starting"],
        )

    def ps(self) -> list[ProcessRow]:
        return [*self.rows, process("monitor", "monitor", 13)]

    def threads(self) -> list[ThreadRow]:
        return [
            ThreadRow(
                thread=THREAD,
                model="embedded",
                tenant="owner",
                state=ThreadState.RUNNING,
                prompt_tokens=4,
                output_tokens=17,
                output_tokens_max=64,
                service_class=0,
                priority=2,
                age_ms=900,
                process="executor-1",
            )
        ]

    def models(self) -> list[ModelRow]:
        return self.table

    def metrics(self) -> str:
        return (
            "# TYPE llmos_tokens_committed_total counter\n"
            'llmos_tokens_committed_total{process="a"} 3\n'
            'llmos_tokens_committed_total{process="b"} 4\n'
            'llmos_step_seconds_bucket{le="+Inf"} 9\n'
            "garbage\n"
        )

    def add_model(self, path: Path, name: str | None, /) -> ModelAdded:
        self.asked.append(("add", path, name))
        self.table = [*self.table, entry(name or path.name, str(path))]
        return ModelAdded(name=name or path.name, digest=bytes(16))

    def remove_model(self, name: str, /) -> None:
        self.asked.append(("remove", name))

    def load_model(self, name: str | None, /) -> None:
        self.asked.append(("load", name))

    def kill(self, target: str, /, *, signal: int) -> None:
        self.asked.append(("kill", target, signal))

    def cancel(self, thread: bytes, /) -> None:
        self.asked.append(("cancel", thread))

    def suspend(self, thread: bytes, /) -> None:
        self.asked.append(("suspend", thread))

    def resume_thread(self, thread: bytes, /) -> None:
        self.asked.append(("resume", thread))

    def renice(self, thread: bytes, priority: int, /, *, service_class: int | None) -> None:
        self.asked.append(("renice", thread, priority, service_class))

    def train(self, recipe: Recipe, /) -> FakeJob:
        self.asked.append(recipe)
        return FakeJob(self.looks)

    def evaluate(
        self,
        model: str,
        /,
        *,
        data: Sequence[str] | DataRecipe,
        metrics: Sequence[str],
        output_tokens_max: int,
        record: bool,
    ) -> FakeJob:
        self.asked.append(("evaluate", model, data, list(metrics), output_tokens_max, record))
        return FakeJob(self.looks)

    def jobs(self) -> list[JobRow]:
        return [JOB_ROW]

    def job(self, job: str, /) -> FakeJob:
        self.asked.append(("job", job))
        return FakeJob(self.looks)

    def data(self, message: DataClean | DataAugment | DataInspect, /) -> DataReport:
        self.asked.append(message)
        return self.report

    def import_version(self, path: Path, name: str, /, *, base: str | None) -> Saved:
        self.asked.append(("import", path, name, base))
        return Saved(VERSION.version, VERSION.reference, VERSION.bytes, 1 << 10)

    def export_version(self, reference: str, path: str, /, *, merge: bool) -> None:
        self.asked.append(("export", reference, path, merge))

    def versions(self, name: str | None, /, *, patience_s: float | None) -> list[VersionRow]:
        if self.store_down is not None:
            raise self.store_down
        return [VERSION]

    def tag(self, reference: str, tag: str, /, *, expect: str | None) -> None:
        self.asked.append(("tag", reference, tag, expect))

    def untag(self, name: str, tag: str, /) -> None:
        self.asked.append(("untag", name, tag))

    def verify(self, reference: str | None, /) -> Verified:
        self.asked.append(("verify", reference))
        return Verified(1, 9, 1 << 20, self.damage)

    def collect(self) -> Collected:
        return Collected(3, 1 << 20, 1)

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
    ) -> Deploying:
        self.asked.append(("deploy", reference, name, replicas, device, gate, wait))
        return Deploying(name or "bot", VERSION.reference, VERSION.version, None)

    def rollback(self, name: str, /, *, wait: bool) -> Deploying:
        self.asked.append(("rollback", name, wait))
        return Deploying(name, VERSION.reference, VERSION.version, None)

    def undeploy(self, name: str, /) -> None:
        self.asked.append(("undeploy", name))

    def deployments(self) -> list[DeploymentRow]:
        return self.deployed

    def keys(self) -> list[KeyRow]:
        return [KeyRow(name="ann", operator=False, created_s=0)]

    def add_key(self, name: str, /, *, operator: bool) -> str:
        self.asked.append(("add key", name, operator))
        return "llmos-secret"

    def remove_key(self, name: str, /) -> None:
        self.asked.append(("remove key", name))


class FakeSystem:
    """Implements libllm.cli.system.System in a folder of the test."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.operator = FakeOperator()
        self.runs = True
        self.did: list[object] = []
        self.lines: list[str | BaseException] = []
        """What the person types."""
        self.refusal: RemoteError | None = None
        """Of a boot."""
        self.homes: list[Home] = []
        """That were asked for."""

    def home(self, given: str | None) -> Home:
        self.homes.append(Home(Path(given) if given is not None else self.folder))
        return self.homes[-1]

    def is_running(self, home: Home) -> bool:
        return self.runs

    @contextlib.contextmanager
    def connect(self, home: Home) -> Iterator[FakeOperator]:
        if not self.runs:
            raise RemoteError(ErrorKind.UNAVAILABLE, f"no system runs in {home.root}")
        self.did.append("connect")
        yield self.operator

    def boot(self, home: Home, *, timeout_s: float) -> bool:
        if self.refusal is not None:
            raise self.refusal
        ran, self.runs = self.runs, True
        self.did.append(("boot", timeout_s))
        return not ran

    def become(self, home: Home) -> NoReturn:
        self.did.append("become")
        raise SystemExit(0)

    def stop(self, home: Home) -> bool:
        ran, self.runs = self.runs, False
        self.did.append("stop")
        return ran

    def fetch(self, name: str, *, progress: bool) -> Path:
        self.did.append(("fetch", name))
        return self.folder / "snapshot"

    def input(self, prompt: str) -> str:
        line = self.lines.pop(0) if self.lines else EOFError()
        if isinstance(line, BaseException):
            raise line
        return line


class Output(msgspec.Struct, frozen=True):
    """What a command did."""

    code: int
    stdout: str
    stderr: str

    def document(self) -> object:
        """Standard output, which is one JSON document."""
        return msgspec.json.decode(self.stdout)


class CommandLine:
    """Runs commands in this process."""

    def __init__(self, system: FakeSystem) -> None:
        self.system = system

    def __call__(self, *arguments: str, stdin: str = "") -> Output:
        result = CliRunner().invoke(app, list(arguments), obj=self.system, input=stdin)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return Output(result.exit_code, result.stdout, result.stderr)


@pytest.fixture
def system(tmp_path: Path) -> FakeSystem:
    return FakeSystem(tmp_path)


@pytest.fixture
def llmos(system: FakeSystem) -> CommandLine:
    return CommandLine(system)
