"""Where things are, how the system is set, and what init hands to a process.

The only module that reads environment variables. Everything here is read once, in `__main__` or by
`connect`, and passed down as values.
"""

import importlib.util
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Final, Literal

import msgspec
from llmproto.errors import ErrorKind, RemoteError, invalid
from msgspec import Meta

from libllm.remote import Remote, check_listen

SUN_PATH_BYTES_MAX: Final = 107
"""What `sun_path` holds on Linux (108) less its final zero; macOS has 103, of which bind() itself
tells."""
PROOF_BYTES: Final = 32
CONFIG_BYTES_MAX: Final = 1 << 20

Bytes = Annotated[int, Meta(ge=0, le=(1 << 53) - 1)]
Count = Annotated[int, Meta(ge=1, le=1 << 20)]


class Home(msgspec.Struct, frozen=True):
    """The folder of one system: the only place where it keeps state."""

    root: Path

    @classmethod
    def find(cls, given: str | Path | None = None) -> "Home":
        """The home that was named, else $LLMOS_HOME, else ~/.llmos; absolute.

        Raises RemoteError(INVALID) where its socket path would be too long.
        """
        named = given if given is not None else os.environ.get("LLMOS_HOME") or "~/.llmos"
        home = cls(Path(os.path.abspath(os.path.expanduser(named))))
        home.check_socket_path()
        return home

    @property
    def run(self) -> Path:
        """Socket, lock and crash notes: worthless after a boot."""
        return self.root / "run"

    @property
    def journal(self) -> Path:
        """The kernel's durable facts."""
        return self.root / "journal"

    @property
    def keys(self) -> Path:
        """Key files, 0600."""
        return self.root / "keys"

    @property
    def logs(self) -> Path:
        """One file a process."""
        return self.root / "logs"

    @property
    def store(self) -> Path:
        """Versions of models and data."""
        return self.root / "store"

    @property
    def cache(self) -> Path:
        """What can be made again: prepared data."""
        return self.root / "cache"

    @property
    def config(self) -> Path:
        """config.toml; may be absent."""
        return self.root / "config.toml"

    @property
    def socket(self) -> Path:
        """The kernel's socket."""
        return self.run / "kernel.sock"

    @property
    def endpoint(self) -> str:
        """The kernel's address for ZeroMQ."""
        return f"ipc://{self.socket}"

    @property
    def lock(self) -> Path:
        """Held with flock by init for as long as a system runs here."""
        return self.run / "lock"

    @property
    def operator_key(self) -> Path:
        """Proof of the right to operate this system."""
        return self.keys / "operator.key"

    @property
    def service_key(self) -> Path:
        """Proof of a service that init did not start."""
        return self.keys / "service.key"

    @property
    def curve_key(self) -> Path:
        """The kernel's secret key towards other machines."""
        return self.keys / "curve.key"

    @property
    def curve_public(self) -> Path:
        """The public key to it."""
        return self.keys / "curve.pub"

    @property
    def connection(self) -> Path:
        """What another machine needs to connect; absent where the kernel listens on ipc alone."""
        return self.keys / "connection.json"

    def crash_note(self, process: str, incarnation: int) -> Path:
        """What an executor was computing, in a file that outlives it."""
        return self.run / f"step-{process}-{incarnation}.bin"

    def make(self) -> None:
        """Create the folders, closed to other users."""
        try:
            for folder in (self.root, self.run, self.journal, self.keys, self.logs, self.store):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise invalid(
                f"the home {self.root} cannot be written ({error.strerror}): name another with "
                "--home or LLMOS_HOME"
            ) from None

    def check_socket_path(self) -> None:
        """RemoteError(INVALID) with both numbers, where the socket's path exceeds what the system
        can bind."""
        used = len(os.fsencode(self.socket))
        if used > SUN_PATH_BYTES_MAX:
            raise invalid(
                f"the socket path {self.socket} has {used} bytes, a Unix socket's path at most "
                f"{SUN_PATH_BYTES_MAX}: choose a home whose path is at least "
                f"{used - SUN_PATH_BYTES_MAX} bytes shorter (--home or LLMOS_HOME)"
            )


class KernelConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """[kernel]"""

    sync: Literal["group", "never", "always"] = "group"
    """`always`: nothing leaves before its fact is synced. `group`: synced every few ms, not waited
    for."""
    journal_bytes_max: Annotated[int, Meta(ge=16 << 20, le=1 << 50)] = 1 << 30
    """The live journal; beyond it admissions answer EXHAUSTED."""
    listen: str | None = None
    """tcp://ADDRESS:PORT of this machine, for peers on others; absent: ipc alone."""
    trace: bool = False
    """Write every event with its time to run/trace-EPOCH.bin, for debugging. It holds all that was
    said, prompts and keys too."""

    def __post_init__(self) -> None:
        """ValueError for an address that is none, or a wildcard."""
        if self.listen is not None:
            try:
                check_listen(self.listen)
            except RemoteError as error:
                raise ValueError(error.detail) from None


class ExecutorConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """[executor]; absent values are derived from the device."""

    mode: Literal["fast", "exact"] = "fast"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    weights: Literal["auto", "int8", "int4"] = "auto"
    """`auto`: as `dtype` says. int8 and int4 need the native step and lose some quality."""
    step: Literal["auto", "torch"] = "auto"
    """By what a step is computed on CPU: native code where it was built and knows the model, else
    torch; or torch always."""
    kv_bytes: Bytes | None = None
    """Size of the KV cache."""
    threads: Annotated[int, Meta(ge=1, le=4096)] | None = None
    """Threads of the processor for one step."""
    residents_max: Count | None = None
    """Threads of the system on one executor at once."""
    step_tokens: Count | None = None
    """Tokens in one forward pass: bounds how long a prompt holds up its neighbours."""
    mixed_step_ms: Count | None = None
    """How long a forward pass should take that computes prompts beside answers under way (75),
    but at least twice as long as one of those answers alone: longer prompts go in more parts."""
    idle_ms: Annotated[int, Meta(ge=0, le=(1 << 53) - 1)] | None = None
    """A model without threads for so long is unloaded."""


class TrainerConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """[trainer]"""

    share_while_serving: Annotated[float, Meta(ge=0.01, le=1.0)] = 0.25
    """Of its time, for which a job computes while its device answers somebody."""
    cores: Annotated[int, Meta(ge=1, le=4096)] | None = None
    """Of each process of a job that names none; absent: half of the device's, shared by its
    processes."""


class GatewayConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """[gateway]"""

    host: Annotated[str, Meta(min_length=1, max_length=255)] = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535)] = 8750
    """0: any free one."""
    workers: Annotated[int, Meta(ge=1, le=256)] | None = None
    """HTTP worker processes; absent: one, more where there are cores to spare."""
    keys_required: bool = False
    """Always on where the host is not a loopback address."""
    body_bytes_max: Annotated[int, Meta(ge=1024, le=1 << 30)] = 1 << 20


class ModelsConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """[models]"""

    default: str | None = None
    """Name in the model table for requests that name none; absent: the first that was registered as
    such."""
    preload: tuple[str, ...] = ()
    """Loaded at boot."""


class DataConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """[data]"""

    cache_bytes_max: Bytes = 32 << 30
    """Tokenised rows under cache/data; beyond it the least recently used are removed."""


class StoreConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """[store]"""

    bytes_max: Bytes | None = None
    """Of all versions together, shared content counted once; absent: what the disk holds."""


class ServicesConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """[services]"""

    run: tuple[str, ...] = ("tokenizer", "monitor", "store", "gateway")
    """Started at boot, beside executors and the data service, which start on demand."""


class SystemConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The whole config.toml."""

    kernel: KernelConfig = KernelConfig()
    executor: ExecutorConfig = ExecutorConfig()
    trainer: TrainerConfig = TrainerConfig()
    gateway: GatewayConfig = GatewayConfig()
    models: ModelsConfig = ModelsConfig()
    store: StoreConfig = StoreConfig()
    services: ServicesConfig = ServicesConfig()
    data: DataConfig = DataConfig()

    @classmethod
    def read(cls, path: Path) -> "SystemConfig":
        """What the file says, defaults where it is absent; RemoteError(INVALID) naming file and key
        otherwise."""
        try:
            with path.open("rb") as file:
                text = file.read(CONFIG_BYTES_MAX + 1)
        except FileNotFoundError:
            return cls()
        except OSError as error:
            raise invalid(f"{path} cannot be read: {error.strerror}") from None
        if len(text) > CONFIG_BYTES_MAX:
            raise invalid(f"{path} has more than {CONFIG_BYTES_MAX} bytes")
        try:
            return msgspec.convert(tomllib.loads(text.decode()), cls)
        except (UnicodeDecodeError, tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
            raise invalid(f"{path}: {error}") from None


class ProcessEnvironment(msgspec.Struct, frozen=True):
    """What a process of the system starts with."""

    home: Home
    process: str | None = None
    """Its name; absent where init did not start it."""
    incarnation: int = 0
    proof: bytes = b""
    """Says Hello with it."""
    lifeline_fd: int | None = None
    """End-of-file here means: init is gone, exit at once."""
    init_fd: int | None = None
    """The kernel's end of the socketpair with init."""
    remote: Remote | None = None
    """The system, where it is another machine's."""

    @property
    def endpoint(self) -> str:
        """The kernel's address."""
        return self.home.endpoint if self.remote is None else self.remote.url

    @property
    def server_key(self) -> str | None:
        """The kernel's public key, where the address needs one."""
        return None if self.remote is None else self.remote.server_key

    @classmethod
    def read(cls, environment: Mapping[str, str] | None = None) -> "ProcessEnvironment":
        """From the variables that init sets; without a proof of init's, the home's service key
        serves, or that of the connection file which LLMOS_CONNECTION names.

        Takes the proof out of its file descriptor and closes that, so that no descendant can read
        it.
        """
        values = os.environ if environment is None else environment
        home = Home.find(values.get("LLMOS_HOME") or None)
        file_name = values.get("LLMOS_CONNECTION")
        remote = Remote.read(file_name) if file_name else None
        proof_fd = _number(values, "LLMOS_PROOF_FD")
        if proof_fd is None and remote is not None:
            proof = bytes.fromhex(remote.service)
        elif proof_fd is None:
            proof = read_key(home.service_key)
        else:
            with os.fdopen(proof_fd, "rb", buffering=0) as file:
                proof = _read_exactly(file.fileno())
        return cls(
            home=home,
            process=values.get("LLMOS_PROCESS") or None,
            incarnation=_number(values, "LLMOS_INCARNATION") or 0,
            proof=proof,
            lifeline_fd=_number(values, "LLMOS_LIFELINE_FD"),
            init_fd=_number(values, "LLMOS_INIT_FD"),
            remote=remote,
        )


def read_key(path: Path) -> bytes:
    """The content of a key file; empty where there is none, DENIED where this user may not read
    it."""
    try:
        with path.open("rb") as file:
            return file.read(256)
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise RemoteError(
            ErrorKind.DENIED,
            f"{path} cannot be read ({error.strerror}): use the system as the user that owns it",
        ) from None


def child_environment() -> dict[str, str]:
    """The environment for `python -m` of our own packages: they are found where this process found
    its own."""
    roots = []
    for package in ("llmproto", "libllm", "llmkernel", "llmservices"):
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.origin is not None:
            roots.append(str(Path(spec.origin).parent.parent))
    inherited = os.environ.get("PYTHONPATH")
    path = [*dict.fromkeys(roots), *([inherited] if inherited else [])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path)}


def _number(values: Mapping[str, str], name: str) -> int | None:
    text = values.get(name)
    if not text:
        return None
    if not text.isascii() or not text.isdigit():
        raise invalid(f"{name} must be a number, it is {text!r}")
    return int(text)


def _read_exactly(fd: int) -> bytes:
    """The proof from a pipe or a file, which may come in pieces."""
    proof = b""
    while len(proof) < PROOF_BYTES:
        part = os.read(fd, PROOF_BYTES - len(proof))
        if not part:
            break
        proof += part
    return proof
