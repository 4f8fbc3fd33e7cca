"""A version as a plain Hugging Face folder.

The folder appears whole, by one rename.  Every byte is compared with its digest on the way.
"""

import errno
import os
import secrets
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

from libllm.config import child_environment
from llmproto.errors import ErrorKind, RemoteError, invalid

from llmservices.versions.manifest import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    MODEL_WEIGHTS,
    GroupEntry,
    Manifest,
    read_file,
    read_manifest,
)
from llmservices.versions.pieces import new_buffer, pieces_of
from llmservices.versions.safetensors_file import make_header, ordered, write_all

MERGE_S_MAX: Final = 3600
"""Of the process that merges an adapter: the largest models take minutes."""
MERGED: Final = "llmservices.versions.merged"


def export(folder: Path, target: Path, *, merge: bool) -> None:
    """Write the version in `folder` as `target`; INVALID where that is there and not empty."""
    if not target.is_absolute():
        raise invalid(f"{target} is not an absolute path")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise invalid(f"{target} is there and not an empty folder: name another, or empty it")
    manifest, _ = read_manifest(folder)
    beside = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    try:
        beside.mkdir(parents=True)
        _write(folder, manifest, beside, merge=merge)
        beside.rename(target)
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            raise _full(manifest, target) from None
        raise invalid(f"{target} cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _write(folder: Path, manifest: Manifest, target: Path, *, merge: bool) -> None:
    files = {file.name: file for file in manifest.files}
    groups = {group.file: group for group in manifest.groups}
    if manifest.is_adapter and merge:
        del files[ADAPTER_CONFIG], groups[ADAPTER_WEIGHTS], groups[MODEL_WEIGHTS]
        _merge(folder, target / MODEL_WEIGHTS)
    elif manifest.is_adapter:
        files = {ADAPTER_CONFIG: files[ADAPTER_CONFIG]}
        groups = {ADAPTER_WEIGHTS: groups[ADAPTER_WEIGHTS]}
    for file in files.values():
        path = target / file.name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(read_file(folder, file))
    for group in groups.values():
        path = target / group.file
        path.parent.mkdir(exist_ok=True)
        _write_group(folder, group, path)


def _write_group(folder: Path, group: GroupEntry, path: Path) -> None:
    buffer = new_buffer()
    tensors = ordered(group.tensors)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        # Without `format`, transformers refuses the file.
        write_all(fd, make_header(tensors, {"format": "pt", **group.metadata}))
        for tensor in tensors:
            for piece in pieces_of(folder, group, tensor):
                view = memoryview(buffer)[: piece.length]
                piece.read(view)
                write_all(fd, view)
    finally:
        os.close(fd)


def _merge(folder: Path, path: Path) -> None:
    """In a process of its own: tensors are computed there, and this one knows no torch."""
    command = [sys.executable, "-P", "-m", MERGED, str(folder), str(path)]
    done = subprocess.run(
        command,
        env=child_environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=MERGE_S_MAX,
        check=False,
    )
    if done.returncode == os.EX_DATAERR:
        raise invalid(done.stderr.strip())
    if done.returncode == os.EX_IOERR:
        raise OSError(errno.ENOSPC, done.stderr.strip())
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise RemoteError(
            ErrorKind.INTERNAL, f"merging {folder} ended with {done.returncode}: {last}"
        )


def _full(manifest: Manifest, target: Path) -> RemoteError:
    free = shutil.disk_usage(target.parent).free
    return RemoteError(
        ErrorKind.EXHAUSTED,
        f"the disk of {target.parent} is full: the folder needs {manifest.size_bytes} bytes, and "
        f"{free} are free",
    )
