"""`python -m llmservices.versions.merged VERSION FILE`: a version's model, its adapter merged in,
as one safetensors file."""

import errno
import os
import sys
from pathlib import Path
from typing import Any

import torch
from llmproto.errors import RemoteError

from llmservices.versions.manifest import MODEL_WEIGHTS
from llmservices.versions.safetensors_file import make_header, ordered, write_all
from llmservices.versions.weights import VersionTensors


def write_merged(folder: Path, path: Path) -> None:
    """One tensor at a time."""
    torch.set_num_threads(1)
    with VersionTensors(folder) as tensors, path.open("wb", buffering=0) as file:
        # A tensor's line is the base's, but for a head that the adapter brings.
        lines = {name: tensors.entry(name) for name in tensors.names}
        entries = ordered(
            [
                type(line)(name, line.dtype, line.shape, line.size_bytes)
                for name, line in lines.items()
            ]
        )
        group = tensors.manifest.group(MODEL_WEIGHTS)
        metadata = {} if group is None else group.metadata
        write_all(file.fileno(), make_header(entries, {"format": "pt", **metadata}))
        for entry in entries:
            # Any: numpy declares no buffer.
            raw: Any = tensors.read(entry.name).contiguous().reshape(-1).view(torch.uint8).numpy()
            write_all(file.fileno(), memoryview(raw))


def main() -> int:
    """What went wrong stands on standard error, and in the exit code."""
    try:
        write_merged(Path(sys.argv[1]), Path(sys.argv[2]))
    except RemoteError as error:
        print(error.detail, file=sys.stderr)
        return os.EX_DATAERR
    except OSError as error:
        if error.errno not in {errno.ENOSPC, errno.EDQUOT}:
            raise
        print(error, file=sys.stderr)
        return os.EX_IOERR
    return 0


if __name__ == "__main__":
    sys.exit(main())
