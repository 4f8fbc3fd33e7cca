"""Whether a killed process was killed for memory, by the cgroup's own count."""

from pathlib import Path

from llmkernel import cgroup


def killed_count(root: Path) -> int | None:
    """OOM kills in our control group so far; None where the system does not say."""
    for folder in cgroup.folders(root, "memory")[:1]:
        name = "memory.events" if cgroup.is_unified(root, "memory") else "memory.oom_control"
        return cgroup.read_fields(folder / name).get("oom_kill")
    return None


class OomCount:
    """Attributes each counted kill to one death, within the time since the count before last.

    A process takes a while to die, so that the count moves before the death is seen.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._older = self._newer = killed_count(root)

    def refresh(self) -> None:
        """Called every few seconds: kills from before the last refresh are nobody's any more."""
        self._older = self._newer
        self._newer = killed_count(self._root)

    def take(self) -> bool:
        """A process was killed and not by us: whether a counted kill explains it."""
        now = killed_count(self._root)
        if now is None or self._older is None or now <= self._older:
            return False
        self._older += 1
        self._newer = max(self._newer or 0, self._older)
        return True
