"""Every change that the store makes to its disk: each is one method here and a named point.

A test passes a Disk of its own that dies, or finds the disk full, at the n-th point.  What is not
here (the index, which is a cache) may be lost at any moment.
"""

import os
import shutil
from pathlib import Path


class Disk:
    """The real one.  Methods may be called by several threads at once."""

    def point(self, what: str, path: Path) -> None:
        """Called before each change."""

    def make_folder(self, path: Path) -> None:
        """It must not be there; its parent is."""
        self.point("make_folder", path)
        path.mkdir(mode=0o700)

    def write(self, path: Path, content: bytes | bytearray | memoryview) -> None:
        """Make a read-only file; its content is not durable yet."""
        self.point("create", path)
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o444)
        try:
            self.point("write", path)
            view = memoryview(content)
            while view:
                view = view[os.write(fd, view) :]
        finally:
            os.close(fd)

    def sync(self, path: Path) -> None:
        """A file's content, or a folder's names, are durable when this returns."""
        self.point("sync", path)
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def rename(self, source: Path, target: Path) -> None:
        """Replaces a file."""
        self.point("rename", target)
        source.rename(target)

    def link(self, source: Path, target: Path) -> None:
        """A second name for a file."""
        self.point("link", target)
        os.link(source, target)

    def unlink(self, path: Path) -> None:
        """It may be gone already."""
        self.point("unlink", path)
        path.unlink(missing_ok=True)

    def remove_tree(self, path: Path) -> None:
        """A folder and all in it; it may be gone already."""
        self.point("remove_tree", path)
        shutil.rmtree(path, ignore_errors=True)

    def free_bytes(self, path: Path) -> int:
        """What may still be written."""
        stat = os.statvfs(path)
        return stat.f_bavail * stat.f_frsize
