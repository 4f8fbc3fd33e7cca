"""What a Hugging Face folder holds, read without loading a model, and refused early when it is not
whole.

Every refusal is INVALID and names the file and what to do.  Nothing of the folder is executed.
"""

import hashlib
from pathlib import Path
from typing import Final

import msgspec
from llmproto import limits
from llmproto.errors import invalid

from llmservices.models.tasks import ENCODER_FILES, Task, module_files, task_of
from llmservices.texts.tokenizer_config import (
    CHAT_TEMPLATE,
    SPECIAL_TOKENS,
    TOKENIZER_CONFIG,
    decode_file,
    read_tokenizer_config,
)
from llmservices.tokenizer import weights

CONFIG: Final = "config.json"
GENERATION_CONFIG: Final = "generation_config.json"
TOKENIZER: Final = "tokenizer.json"

TOKENIZER_FILES: Final = (CHAT_TEMPLATE, SPECIAL_TOKENS, TOKENIZER, TOKENIZER_CONFIG)
SMALL_FILES: Final = (CONFIG, GENERATION_CONFIG, weights.INDEX, *TOKENIZER_FILES)
SMALL_FILE_BYTES_MAX: Final = 256 << 20  # the largest tokenizer.json in use has about 35 MB


class Config(msgspec.Struct):
    """What is read of config.json; families name the same thing differently.

    Multimodal families nest the language model's part as `text_config`.
    """

    architectures: list[str] | None = None
    model_type: str | None = None
    max_position_embeddings: int | None = None
    n_positions: int | None = None
    n_ctx: int | None = None
    max_seq_len: int | None = None
    max_sequence_length: int | None = None
    seq_length: int | None = None
    vocab_size: int | None = None
    eos_token_id: int | list[int] | None = None
    bos_token_id: int | list[int] | None = None
    dtype: str | None = None
    torch_dtype: str | None = None
    text_config: "Config | None" = None

    def context_tokens(self) -> int | None:
        """The longest context, under whichever name it stands."""
        names = (
            self.max_position_embeddings,
            self.n_positions,
            self.n_ctx,
            self.max_seq_len,
            self.max_sequence_length,
            self.seq_length,
        )
        return next((tokens for tokens in names if tokens is not None), None)


class Family(msgspec.Struct, frozen=True):
    """Numbers that a family's published folders leave out, because they are its defaults."""

    context_tokens: int | None = None
    vocab_tokens: int | None = None


FAMILIES: Final = {"gemma3_text": Family(context_tokens=131_072, vocab_tokens=262_208)}


class GenerationConfig(msgspec.Struct):
    """What is read of generation_config.json."""

    eos_token_id: int | list[int] | None = None
    bos_token_id: int | list[int] | None = None


class ModelFolder(msgspec.Struct, frozen=True):
    """A whole model, as its files describe it."""

    path: str
    """Absolute."""
    architecture: str
    model_type: str
    context_tokens: int
    vocab_tokens: int
    """Rows of the embedding: token ids are below it."""
    eos_tokens: tuple[int, ...]
    """Of config.json and generation_config.json together, sorted."""
    bos_token: int | None
    dtype: str
    weight_bytes: int
    weight_files: tuple[str, ...]
    has_chat_template: bool
    digest: bytes
    """16 bytes; see `_digest`.  Of a version of the store, the beginning of its own."""
    tokenizer_digest: bytes
    """16 bytes, over the names, sizes and contents of TOKENIZER_FILES alone: what text and ids
    depend on.
    """
    task: Task = Task("generate")
    """Generates, embeds, classifies; what the result's columns mean."""
    version: bytes | None = None
    """Digest of the store's version that it is, where it is one."""


def inspect(folder: Path) -> ModelFolder:
    """Read and check a folder, plain or a version's; quick whatever the weights' size."""
    folder = _directory(folder)
    version = weights.read_version(folder)
    small = read_small(folder, SMALL_FILES)
    for name, what in ((CONFIG, "is no model folder"), (TOKENIZER, "has no tokenizer")):
        if name not in small:
            raise invalid(
                f"{folder}: {what}: {name} is missing; fetch the rest of the folder or name "
                "another one"
            )
    config = decode_file(folder / CONFIG, small[CONFIG], Config)
    small |= read_small(folder, ENCODER_FILES)
    small |= read_small(folder, tuple(module_files(folder, small)))
    task = task_of(folder, small)
    if task.kind == "generate":  # what other libraries put beside it changes nothing here
        small = {name: content for name, content in small.items() if name in SMALL_FILES}
    text = config.text_config or config
    generation = decode_file(
        folder / GENERATION_CONFIG, small.get(GENERATION_CONFIG, b"{}"), GenerationConfig
    )
    family = FAMILIES.get(text.model_type or "", Family())
    files = (
        [weights.read_weight_file(folder, name) for name in weights.weight_names(folder)]
        if version is None
        else version.files
    )
    bos = _ids(text.bos_token_id) or _ids(config.bos_token_id) or _ids(generation.bos_token_id)
    eos = {*_ids(config.eos_token_id), *_ids(text.eos_token_id), *_ids(generation.eos_token_id)}
    dtypes = (text.dtype, text.torch_dtype, config.dtype, config.torch_dtype, files[0].dtype)
    context_tokens = _required(
        folder,
        "max_position_embeddings",
        text.context_tokens(),
        config.context_tokens(),
        family.context_tokens,
    )
    return ModelFolder(
        path=str(folder),
        architecture=(config.architectures or [""])[0],
        model_type=config.model_type or "",
        context_tokens=min(context_tokens, task.input_tokens_max or context_tokens),
        vocab_tokens=_required(
            folder, "vocab_size", text.vocab_size, config.vocab_size, family.vocab_tokens
        ),
        eos_tokens=tuple(sorted(eos)) if task.kind == "generate" else (),
        bos_token=bos[0] if bos else None,
        dtype=next((name.removeprefix("torch.") for name in dtypes if name), "float32"),
        weight_bytes=sum(file.size_bytes for file in files),
        weight_files=tuple(file.name for file in files),
        has_chat_template=read_tokenizer_config(folder, small).chat_template is not None,
        task=task,
        digest=_digest(folder, small, files) if version is None else version.digest[:16],
        tokenizer_digest=tokenizer_digest(small),
        version=None if version is None else version.digest,
    )


def read_small(folder: Path, names: tuple[str, ...]) -> dict[str, bytes]:
    """Contents of those of the named files that are there."""
    contents: dict[str, bytes] = {}
    for name in names:
        path = folder / name
        try:
            bytes_there = path.stat().st_size
            if bytes_there > SMALL_FILE_BYTES_MAX:
                raise invalid(
                    f"{path}: has {bytes_there} bytes, more than {SMALL_FILE_BYTES_MAX}; it "
                    "cannot be right"
                )
            contents[name] = path.read_bytes()
        except FileNotFoundError:
            continue
        except OSError as error:
            raise weights.unreadable(path, error) from error
    return contents


def tokenizer_digest(small: dict[str, bytes]) -> bytes:
    """16 bytes over those of TOKENIZER_FILES that are there, as `_small_hasher` feeds them."""
    return _small_hasher(small, TOKENIZER_FILES).digest()


def _directory(folder: Path) -> Path:
    """The absolute path, if a directory that can be listed stands there."""
    try:
        folder = folder.expanduser().resolve()
        if not folder.exists():
            raise invalid(f"{folder}: is not there; name the folder of a model")
        if not folder.is_dir():
            raise invalid(
                f"{folder}: is a file; name the folder that holds {CONFIG} and the weights"
            )
        next(folder.iterdir(), None)
    except OSError as error:
        raise weights.unreadable(folder, error) from error
    except (ValueError, RuntimeError) as error:  # a NUL byte; an unknown home
        raise invalid(f"{str(folder)!r}: is not a path ({error})") from error
    if len(str(folder).encode(errors="surrogateescape")) > limits.PATH_BYTES_MAX:
        raise invalid(
            f"{str(folder)[:80]}...: the path is longer than {limits.PATH_BYTES_MAX} bytes"
        )
    return folder


def _ids(value: int | list[int] | None) -> list[int]:
    if value is None:
        return []
    return [value] if isinstance(value, int) else value


def _required(folder: Path, name: str, *candidates: int | None) -> int:
    """The first number that is there."""
    for number in candidates:
        if number is not None:
            if number < 1:
                raise invalid(f"{folder / CONFIG}: {name} is {number}; it must be at least 1")
            return number
    raise invalid(
        f"{folder / CONFIG}: does not say {name}, under that name or another family's; add it"
    )


def _small_hasher(small: dict[str, bytes], names: tuple[str, ...]) -> "hashlib.blake2b":
    """For each file that is there, in the order of names: name, NUL, size as 8 bytes little endian,
    content.
    """
    hasher = hashlib.blake2b(digest_size=16)
    for name in sorted(names):
        if name in small:
            hasher.update(name.encode() + b"\0" + len(small[name]).to_bytes(8, "little"))
            hasher.update(small[name])
    return hasher


def _digest(folder: Path, small: dict[str, bytes], files: list[weights.WeightFile]) -> bytes:
    """BLAKE2b of 16 bytes over all files that make the model what it is; others (a README) do not
    count.

    First the small files (SMALL_FILES; of an encoder those of its modules too), as `_small_hasher`
    feeds them.  Then for each weight file, in the order of names: name, NUL, size as 8 bytes little
    endian, the whole safetensors header, and the samples of `weights.add_samples`.  So a changed
    tensor that keeps its place in a file of over 32 MiB may go unseen; another size, name, shape or
    configuration never does.
    """
    hasher = _small_hasher(small, tuple(small))
    for file in files:
        hasher.update(file.name.encode() + b"\0" + file.size_bytes.to_bytes(8, "little"))
        hasher.update(file.header)
        try:
            weights.add_samples(hasher, folder / file.name, file.size_bytes)
        except OSError as error:
            raise weights.unreadable(folder / file.name, error) from error
    return hasher.digest()
