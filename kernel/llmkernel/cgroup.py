"""Where this process stands in the control group trees, version 1 and 2; pure given the root.

Source: Linux, Documentation/admin-guide, cgroup-v1 and cgroup-v2; proc(5) for mountinfo.
"""

from pathlib import Path
from typing import Final

UNIFIED: Final = ""
"""The name of the version 2 tree; those of version 1 are named by controller."""


def folders(root: Path, controller: str) -> list[Path]:
    """The groups of this process for one controller, its own first, up to the top that can be seen.

    Of version 1 where the controller is mounted there, else of version 2; empty where neither is.
    """
    own = _own_paths(root)
    for name in (controller, UNIFIED):
        mount = _mounts(root).get(name)
        if mount is not None and name in own:
            return _upwards(root, own[name], mount)
    return []


def is_unified(root: Path, controller: str) -> bool:
    """Whether `folders` are of version 2."""
    return controller not in _mounts(root) or controller not in _own_paths(root)


def read_text(path: Path) -> str:
    """A file of the kernel's; empty where it is absent or closed to us."""
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError):
        return ""


def read_number(path: Path) -> int | None:
    """A file with one number; absent, `max` and anything else are None."""
    text = read_text(path).strip()
    return int(text) if text.isascii() and text.isdigit() else None


def read_fields(path: Path) -> dict[str, int]:
    """A file of `name number` lines."""
    rows = (line.split() for line in read_text(path).splitlines())
    return {row[0]: int(row[1]) for row in rows if len(row) == 2 and row[1].isdigit()}


def _own_paths(root: Path) -> dict[str, str]:
    """/proc/self/cgroup: controller to path."""
    paths: dict[str, str] = {}
    for line in read_text(root / "proc/self/cgroup").splitlines():
        parts = line.split(":", 2)
        if len(parts) == 3:
            paths.update(dict.fromkeys(parts[1].split(","), parts[2]))
    return paths


def _mounts(root: Path) -> dict[str, tuple[str, str]]:
    """/proc/self/mountinfo: controller to (what of the tree is mounted, where)."""
    mounts: dict[str, tuple[str, str]] = {}
    for line in read_text(root / "proc/self/mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        fields, kind = before.split(), after.split()
        if len(fields) < 5 or len(kind) < 3:
            continue
        if kind[0] == "cgroup2":
            mounts.setdefault(UNIFIED, (fields[3], fields[4]))
        elif kind[0] == "cgroup":
            for option in kind[2].split(","):
                mounts.setdefault(option, (fields[3], fields[4]))
    return mounts


def _upwards(root: Path, own: str, mount: tuple[str, str]) -> list[Path]:
    """In a container the mounted part may be the group itself, and the path may lead outside."""
    top, where = mount
    inside = own.removeprefix(top.rstrip("/")) if own.startswith(top) else ""
    parts = [part for part in inside.split("/") if part]
    base = root / where.lstrip("/")
    if ".." in parts or not base.joinpath(*parts).is_dir():
        parts = []
    return [base.joinpath(*parts[:depth]) for depth in range(len(parts), -1, -1)]
