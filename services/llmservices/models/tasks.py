"""What a model folder computes: text, vectors or scores; read from its small files alone.

Knows no torch, so that whoever examines folders can ask.  Source of the rules: the `config.json` of
transformers (`architectures`, `problem_type`, `id2label`) and the modules.json, N_Pooling and
sentence_bert_config.json of sentence-transformers.
"""

from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Final, Literal, TypeVar

import msgspec
from llmproto.errors import RemoteError, invalid

CONFIG: Final = "config.json"
MODULES: Final = "modules.json"
SENTENCE_CONFIG: Final = "sentence_bert_config.json"
ENCODER_FILES: Final = (MODULES, SENTENCE_CONFIG)
SMALL_FILE_BYTES_MAX: Final = 1 << 20

OFFSET_POSITIONS: Final = frozenset({"roberta", "xlm-roberta", "camembert", "mpnet"})
"""Families whose positions begin behind the padding token's id."""
ENCODERS: Final = (
    frozenset(
        {
            "bert",
            "distilbert",
            "electra",
            "albert",
            "deberta",
            "deberta-v2",
            "modernbert",
            "nomic_bert",
        }
    )
    | OFFSET_POSITIONS
)
"""Families that are encoders whatever their head."""
CLASSIFIER: Final = "ForSequenceClassification"

TaskKind = Literal["generate", "embed", "classify", "regress"]
Problem = Literal["embedding", "single_label", "multi_label", "regression"]
Pool = Literal["cls", "mean", "max", "mean_sqrt_len", "weighted_mean", "last"]

_POOLS: Final[dict[str, Pool]] = {
    "cls_token": "cls",
    "max_tokens": "max",
    "mean_tokens": "mean",
    "mean_sqrt_len_tokens": "mean_sqrt_len",
    "weightedmean_tokens": "weighted_mean",
    "lasttoken": "last",
}
"""In the order in which their vectors stand side by side where several are asked for."""
_MODES: Final[dict[str, Pool]] = {
    "cls": "cls",
    "max": "max",
    "mean": "mean",
    "mean_sqrt_len_tokens": "mean_sqrt_len",
    "weightedmean": "weighted_mean",
    "lasttoken": "last",
}

T = TypeVar("T")


class TaskConfig(msgspec.Struct):
    """What is read of config.json."""

    architectures: list[str] | None = None
    model_type: str | None = None
    problem_type: str | None = None
    num_labels: int | None = None
    id2label: dict[str, str | int] | None = None
    max_position_embeddings: int | None = None
    pad_token_id: int | None = None


class Task(msgspec.Struct, frozen=True):
    """What a folder computes, and what its columns mean."""

    kind: TaskKind
    problem: Problem = "embedding"
    labels: tuple[str, ...] = ()
    """Of a classifier, one a column."""
    pools: tuple[Pool, ...] = ()
    """Of an embedding model: how token vectors become one; several stand side by side."""
    normalise: bool = False
    """Vectors get length 1."""
    input_tokens_max: int | None = None
    """The longest input, where the folder says less than its positions allow."""


class _Module(msgspec.Struct):
    path: str = ""
    type: str = ""


class _Sentence(msgspec.Struct):
    max_seq_length: int | None = None


def read_task(folder: Path) -> Task:
    """The task of a folder; INVALID where it asks for something that is not supported."""
    files: dict[str, bytes] = {}
    for name in (CONFIG, *ENCODER_FILES):
        _read(folder, name, files)
    for name in module_files(folder, files):
        _read(folder, name, files)
    return task_of(folder, files)


def module_files(folder: Path, files: Mapping[str, bytes]) -> list[str]:
    """Names of the configurations that modules.json leads to."""
    names = []
    for module in _modules(folder, files):
        parts = PurePosixPath(module.path).parts
        if not parts or module.type.rpartition(".")[2] not in ("Pooling", "Dense", "LayerNorm"):
            continue
        if ".." in parts or module.path.startswith("/"):
            raise invalid(f"{folder / MODULES}: names {module.path!r}, which is outside the folder")
        names.append(str(PurePosixPath(module.path) / CONFIG))
    return names


def task_of(folder: Path, files: Mapping[str, bytes]) -> Task:
    """The same, from the contents of the folder's files."""
    config = _decode(folder / CONFIG, files.get(CONFIG, b"{}"), TaskConfig)
    architecture = (config.architectures or [""])[0]
    if architecture.endswith(CLASSIFIER):
        return _classifier(folder, config)
    if config.model_type not in ENCODERS:
        return Task("generate")
    pools, normalise = _pooling(folder, files)
    sentence = _decode(folder / SENTENCE_CONFIG, files.get(SENTENCE_CONFIG, b"{}"), _Sentence)
    return Task(
        "embed",
        pools=pools,
        normalise=normalise,
        input_tokens_max=_least(_positions(config), sentence.max_seq_length),
    )


def _classifier(folder: Path, config: TaskConfig) -> Task:
    names = config.id2label or {}
    count = config.num_labels if config.num_labels is not None else len(names) or 2
    if count < 1:
        raise invalid(f"{folder / CONFIG}: num_labels is {count}; it must be at least 1")
    problem: Problem
    match config.problem_type:
        case "regression":
            problem = "regression"
        case "multi_label_classification":
            problem = "multi_label"
        case "single_label_classification":
            problem = "single_label"
        case None:
            problem = "regression" if count == 1 else "single_label"
        case other:
            raise invalid(f"{folder / CONFIG}: problem_type {other!r} is not supported")
    labels = tuple(str(names.get(str(at), f"LABEL_{at}")) for at in range(count))
    kind: TaskKind = "regress" if problem == "regression" else "classify"
    return Task(kind, problem=problem, labels=labels, input_tokens_max=_positions(config))


def _positions(config: TaskConfig) -> int | None:
    """Positions that an input may take, where the family keeps some for itself."""
    if config.model_type not in OFFSET_POSITIONS or config.max_position_embeddings is None:
        return None
    padding = 1 if config.pad_token_id is None else config.pad_token_id
    return config.max_position_embeddings - padding - 1


def _least(*numbers: int | None) -> int | None:
    return min((number for number in numbers if number is not None), default=None)


def _modules(folder: Path, files: Mapping[str, bytes]) -> list[_Module]:
    if MODULES not in files:
        return []
    return _decode(folder / MODULES, files[MODULES], list[_Module])


def _pooling(folder: Path, files: Mapping[str, bytes]) -> tuple[tuple[Pool, ...], bool]:
    """How token vectors become one, and whether that gets length 1.  A folder that says nothing
    takes the mean, as sentence-transformers does."""
    pools: tuple[Pool, ...] = ("mean",)
    normalise = False
    for module in _modules(folder, files):
        match module.type.rpartition(".")[2]:
            case "Transformer":
                pass
            case "Pooling":
                name = str(PurePosixPath(module.path) / CONFIG)
                if name not in files:
                    raise invalid(f"{folder / name} is missing; {MODULES} names it")
                pools = _pools(folder / name, files[name])
            case "Normalize":
                normalise = True
            case other:
                raise invalid(
                    f"{folder / MODULES}: the module {other!r} is not supported; Transformer, "
                    "Pooling and Normalize are"
                )
    return pools, normalise


def _pools(path: Path, content: bytes) -> tuple[Pool, ...]:
    values = _decode(path, content, dict[str, object])
    mode = values.get("pooling_mode")
    modes = [mode] if isinstance(mode, str) else mode if isinstance(mode, list) else []
    found = [_MODES.get(str(each)) for each in modes]
    if not found:
        found = [pool for name, pool in _POOLS.items() if values.get(f"pooling_mode_{name}")]
    pools = tuple(pool for pool in found if pool is not None)
    if not pools or len(pools) < len(found):
        raise invalid(f"{path}: the pooling is none of {', '.join(_MODES)}")
    return pools


def _read(folder: Path, name: str, files: dict[str, bytes]) -> None:
    try:
        path = folder / name
        if path.stat().st_size > SMALL_FILE_BYTES_MAX:
            raise invalid(f"{path}: has more than {SMALL_FILE_BYTES_MAX} bytes")
        files[name] = path.read_bytes()
    except FileNotFoundError:
        return
    except OSError as error:
        raise invalid(f"{folder / name}: cannot be read ({error.strerror})") from error


def _decode(path: Path, content: bytes, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(content, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _broken(path, error) from error


def _broken(path: Path, error: Exception) -> RemoteError:
    return invalid(f"{path}: is broken ({error}); fetch it again or correct it")
