"""What the processes of a system have used, as the operating system counts it (Linux)."""

import os
import resource
from pathlib import Path

import msgspec
from llmproto.operation import ProcessRow

_TICK_S = 1 / os.sysconf("SC_CLK_TCK")


class Used(msgspec.Struct, frozen=True):
    """Of one process, since it began."""

    cpu_s: float
    """User and system time of the threads that live."""
    whole_cpu_s: float
    """And of those that have ended; to a hundredth of a second."""
    resident_bytes: int
    peak_bytes: int
    """The most that was resident at once."""


def used(pid: int) -> Used:
    """What a living process has used; its threads included."""
    stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    rows = Path(f"/proc/{pid}/schedstat")
    cpu_s = whole_cpu_s = (int(stat[11]) + int(stat[12])) * _TICK_S
    tasks = list(rows.parent.glob("task/*/schedstat"))
    if tasks:  # nanoseconds, where the kernel keeps them; ticks are 10 ms
        cpu_s = sum(int(task.read_text().split()[0]) for task in tasks) / 1e9
    resident = int(stat[21]) * resource.getpagesize()
    status = Path(f"/proc/{pid}/status").read_text()
    peak = int(status.partition("VmHWM:")[2].split(maxsplit=1)[0]) * 1024
    return Used(cpu_s, whole_cpu_s, resident, max(peak, resident))


def by_name(rows: list[ProcessRow]) -> dict[str, Used]:
    """Of every process that has a pid."""
    return {row.name: used(row.pid) for row in rows if row.pid is not None}
