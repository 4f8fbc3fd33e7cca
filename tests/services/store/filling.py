"""`python filling.py FOLDER`: a store on a disk of 6 MB; prints what the save that is too large is
told."""

import sys
from pathlib import Path

from llmproto.errors import RemoteError
from llmproto.versions import Save, TensorGroup, TensorPlace, VersionKind
from llmservices.store.archive import Archive
from llmservices.store.verifying import Verifier


def save(archive: Archive, buffer: Path, size: int) -> None:
    """One tensor."""
    buffer.write_bytes(size.to_bytes(8, "little") * (size // 8))
    group = TensorGroup("model.safetensors", [TensorPlace("t", "U8", [size], 0, size)])
    archive.save(Save("model", VersionKind.MODEL, str(buffer), [group]), [])


def main() -> None:
    folder = Path(sys.argv[1])
    buffer = folder.parent / "buffer"
    archive = Archive(folder / "store")
    save(archive, buffer, 3 << 20)
    try:
        save(archive, buffer, 5 << 20)
    except RemoteError as error:
        print(error)
    assert len(archive.index.all()) == 1
    assert not list((archive.root / "tmp").iterdir())
    save(archive, buffer, 64)
    verified = Verifier(archive.root).verify(archive.index.all(), archive.damaged)
    assert (verified.versions, verified.damage) == (2, []), verified


if __name__ == "__main__":
    main()
