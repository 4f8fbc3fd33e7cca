"""The manifest of a version: which objects it consists of, and where it comes from.

A version's folder holds its small files (configuration, tokenizer) as plain files, and
`manifest.json`; its weights lie in the store's objects.  The version's digest is the BLAKE3 of
`manifest.json`; the folder's name is its beginning, so a manifest that has changed is not read.

Layout of a store:

    objects/ab/<BLAKE3 of the content, hexadecimal>     read-only files
    versions/<first 32 digits of the digest>/           small files, manifest.json, stamp.json

A tensor is cut into pieces of PIECE_BYTES from its own beginning, so that equal tensors share all
of them wherever they stand; each piece is an object, and so is each small file.  Since format 2,
tensors below PACK_BELOW_BYTES of one save and one file lie one after another in packs, which are
objects too; a tensor that the store has already is not packed again.
"""

from pathlib import Path
from typing import Final

import msgspec
from blake3 import blake3
from llmproto.errors import RemoteError, invalid
from llmproto.generation import Thread
from llmproto.versions import Lineage, VersionKind

MANIFEST: Final = "manifest.json"
STAMP: Final = "stamp.json"
VERSIONS: Final = "versions"
OBJECTS: Final = "objects"

PIECE_BYTES: Final = 4 << 20
FOLDER_DIGITS: Final = 32
SHORT_DIGITS: Final = 8
PACK_BELOW_BYTES: Final = 512 << 10
"""To sync a file costs about what writing so many bytes costs.  A pack stays as long as a version
needs one tensor of it: with larger ones that would be much."""
PACK_BYTES: Final = 4 << 20
"""At most."""
FORMAT: Final = 2
FORMATS_READ: Final = frozenset({1, 2})
MANIFEST_BYTES_MAX: Final = 1 << 30

MODEL_WEIGHTS: Final = "model.safetensors"
ADAPTER_WEIGHTS: Final = "adapter_model.safetensors"
ADAPTER_CONFIG: Final = "adapter_config.json"
OPTIMIZER: Final = "optimizer.safetensors"
STATE: Final = "state.json"

DTYPE_BYTES: Final = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1,
    "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4,
    "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip
"""Of one element, by the names of the safetensors format."""


class FileEntry(msgspec.Struct, frozen=True):
    """One small file."""

    name: str
    size_bytes: int
    object: str
    """BLAKE3 of the content, hexadecimal."""


class InPack(msgspec.Struct, frozen=True, array_like=True):
    """Where in its object a small tensor lies."""

    offset: int
    pack_bytes: int
    """Of the whole object."""
    digest: str
    """BLAKE3 of the tensor alone, hexadecimal: it is read without the rest of the pack."""


class Stored(msgspec.Struct, frozen=True, array_like=True):
    """Where the bytes of a tensor lie."""

    objects: list[str]
    """Its pieces in order, or the one pack that it is in."""
    pack: InPack | None = None

    @property
    def digest(self) -> bytes:
        """Of the tensor: what `TensorPlace.digest` names it by."""
        return tensor_digest(self.objects if self.pack is None else [self.pack.digest])

    def pieces(self, size_bytes: int) -> list["PieceEntry"]:
        """All of a tensor of this size."""
        if self.pack is not None:
            return [PieceEntry(self.objects[0], self.pack.digest, 0, size_bytes, self.pack.offset)]
        return [
            PieceEntry(name, name, at, min(PIECE_BYTES, size_bytes - at), 0)
            for name, at in zip(self.objects, range(0, size_bytes, PIECE_BYTES))
        ]

    def sizes(self, size_bytes: int) -> dict[str, int]:
        """Its objects, and the bytes that each must have."""
        if self.pack is not None:
            return {self.objects[0]: self.pack.pack_bytes}
        return {piece.object: piece.size_bytes for piece in self.pieces(size_bytes)}


class PieceEntry(msgspec.Struct, frozen=True):
    """One piece of a tensor."""

    object: str
    digest: str
    """BLAKE3 of the piece, hexadecimal: the object's name, but in a pack."""
    at: int
    """In the tensor."""
    size_bytes: int
    offset: int
    """In the object."""


class TensorEntry(msgspec.Struct, frozen=True, omit_defaults=True):
    """One tensor and where it lies."""

    name: str
    dtype: str
    shape: list[int]
    size_bytes: int
    objects: list[str] = []
    pack: InPack | None = None

    @property
    def stored(self) -> Stored:
        return Stored(self.objects, self.pack)

    @property
    def digest(self) -> bytes:
        """What `TensorPlace.digest` names it by."""
        return self.stored.digest

    def pieces(self) -> list[PieceEntry]:
        """In order."""
        return self.stored.pieces(self.size_bytes)


class GroupEntry(msgspec.Struct, frozen=True, omit_defaults=True):
    """The tensors of one safetensors file."""

    file: str
    tensors: list[TensorEntry]
    metadata: dict[str, str] = {}

    @property
    def size_bytes(self) -> int:
        return sum(tensor.size_bytes for tensor in self.tensors)

    def find(self, name: str) -> TensorEntry | None:
        """Linear: for a few; make a dict for many."""
        return next((tensor for tensor in self.tensors if tensor.name == name), None)


class LineageEntry(msgspec.Struct, frozen=True, omit_defaults=True):
    """`Lineage`, its digests in hexadecimal."""

    parent: str | None = None
    data: str = ""
    recipe: str = ""
    code: str = ""
    job: str | None = None
    step: int = 0
    position: int = 0
    losses: str = ""

    @classmethod
    def of(cls, lineage: Lineage) -> "LineageEntry":
        return cls(
            parent=lineage.parent.hex() if lineage.parent else None,
            data=lineage.data,
            recipe=lineage.recipe,
            code=lineage.code,
            job=lineage.job.hex() if lineage.job else None,
            step=lineage.step,
            position=lineage.position,
            losses=lineage.losses,
        )

    def message(self) -> Lineage:
        job: Thread | None = bytes.fromhex(self.job) if self.job else None
        return Lineage(
            parent=bytes.fromhex(self.parent) if self.parent else None,
            data=self.data,
            recipe=self.recipe,
            code=self.code,
            job=job,
            step=self.step,
            position=self.position,
            losses=self.losses,
        )


class Manifest(msgspec.Struct, frozen=True, omit_defaults=True):
    """The content of `manifest.json`.

    The same content and lineage give the same bytes, but for the packs in which small tensors lie.
    """

    format: int
    name: str
    kind: VersionKind
    task: str
    files: list[FileEntry]
    """By name."""
    groups: list[GroupEntry]
    """By file name."""
    lineage: LineageEntry = LineageEntry()
    metrics: dict[str, float] = {}
    """Known when it was saved."""

    @property
    def size_bytes(self) -> int:
        """Of all files and tensors."""
        groups = sum(group.size_bytes for group in self.groups)
        return groups + sum(file.size_bytes for file in self.files)

    @property
    def is_adapter(self) -> bool:
        return any(group.file == ADAPTER_WEIGHTS for group in self.groups)

    def file(self, name: str) -> FileEntry | None:
        """A small file's entry."""
        return next((file for file in self.files if file.name == name), None)

    def group(self, name: str) -> GroupEntry | None:
        """The tensors of a safetensors file."""
        return next((group for group in self.groups if group.file == name), None)

    def objects(self) -> dict[str, int]:
        """Each object that it needs, and its bytes."""
        found = {file.object: file.size_bytes for file in self.files}
        for group in self.groups:
            for tensor in group.tensors:
                found |= tensor.stored.sizes(tensor.size_bytes)
        return found

    def encode(self) -> bytes:
        """The bytes of `manifest.json`."""
        return msgspec.json.encode(self)


class Stamp(msgspec.Struct, frozen=True):
    """`stamp.json`: what is no part of a version's identity."""

    sequence: int
    """Grows with every version of a store: the newest has the highest."""
    created_ns: int
    keep: int = 1
    """Of a checkpoint: how many of its job's stay."""


def hash_bytes(content: bytes | bytearray | memoryview) -> str:
    """The name of an object with this content."""
    return blake3(content).hexdigest()


def tensor_digest(objects: list[str]) -> bytes:
    """32 bytes: of one piece its own BLAKE3, else the BLAKE3 of the pieces' digests together."""
    if len(objects) == 1:
        return bytes.fromhex(objects[0])
    return blake3(b"".join(map(bytes.fromhex, objects))).digest()


def object_path(store: Path, name: str) -> Path:
    """Where an object lies."""
    return store / OBJECTS / name[:2] / name


def folder_of(store: Path, digest: bytes) -> Path:
    """Where a version lies."""
    return store / VERSIONS / digest.hex()[:FOLDER_DIGITS]


def store_of(folder: Path) -> Path:
    """The store that a version's folder belongs to."""
    return folder.parent.parent


def is_version(folder: Path) -> bool:
    """Whether a folder is a version's, rather than a plain model folder."""
    return (folder / MANIFEST).is_file()


def damaged(folder: Path, file: str, detail: str) -> RemoteError:
    """What to say of content that is not what its name says."""
    return invalid(f"version {folder.name[:SHORT_DIGITS]}: {file} is damaged: {detail}")


def read_manifest(folder: Path) -> tuple[Manifest, bytes]:
    """The manifest of a version's folder, compared with the folder's name, and the digest."""
    path = folder / MANIFEST
    try:
        content = path.read_bytes()
    except OSError as error:
        raise invalid(f"{path} cannot be read: {error.strerror or error}") from None
    return decode_manifest(content, folder)


def decode_manifest(content: bytes, folder: Path) -> tuple[Manifest, bytes]:
    """As `read_manifest`, of bytes that were read before."""
    digest: bytes = blake3(content).digest()
    if digest.hex()[:FOLDER_DIGITS] != folder.name:
        raise damaged(
            folder,
            MANIFEST,
            f"{folder / MANIFEST} has the BLAKE3 {digest.hex()[:FOLDER_DIGITS]}, and not that in "
            "its folder's name; restore it from a copy, or remove the version",
        )
    try:
        manifest = msgspec.json.decode(content, type=Manifest)
    except msgspec.DecodeError as error:
        raise invalid(f"{folder / MANIFEST} is not a manifest: {error}") from None
    if manifest.format not in FORMATS_READ:
        formats = ", ".join(map(str, sorted(FORMATS_READ)))
        raise invalid(
            f"{folder / MANIFEST} has format {manifest.format}; this software reads {formats}"
        )
    return manifest, digest


def read_file(folder: Path, entry: FileEntry) -> bytes:
    """A small file's content; INVALID, with version, file and object, where it has changed."""
    path = folder / entry.name
    where = f"{path} (object {object_path(store_of(folder), entry.object)})"
    try:
        content = path.read_bytes()
    except OSError as error:
        raise damaged(
            folder, entry.name, f"{where} cannot be read: {error.strerror or error}"
        ) from None
    if len(content) != entry.size_bytes or hash_bytes(content) != entry.object:
        raise damaged(
            folder, entry.name, f"{where} has {len(content)} bytes and another BLAKE3 than its name"
        )
    return content


def check_files(folder: Path, manifest: Manifest) -> None:
    """INVALID, naming it, where a small file has changed."""
    for entry in manifest.files:
        read_file(folder, entry)
