"""Which devices there are, as far as this process may use them.

Affinity and control groups bound the CPU set and its memory; NVIDIA GPUs come from NVML, without
torch.  Never raises: what cannot be read is not there, or not bounded.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import msgspec
import pynvml
from llmproto.operation import DeviceRow

from llmkernel import cgroup

UNLIMITED_FROM: Final = 1 << 60
"""Version 1 writes "no limit" as the largest multiple of a page."""
_ROOT: Final = Path("/")


class Memory(msgspec.Struct, frozen=True):
    """Main memory for all processes of this system together."""

    bytes_max: int
    """Installed, or allowed by the tightest group."""
    bytes_free: int
    """Can be had without anybody being killed for it: file pages count as free."""


def detect(root: Path = _ROOT) -> list[DeviceRow]:
    """The CPU set first, then each GPU."""
    cpu = cpu_set(root, allowed_cores())
    return [cpu, *gpus(pynvml, cpu.cores)]


def allowed_cores() -> list[int]:
    """By affinity (cpusets included), ascending."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def cpu_set(root: Path, allowed: list[int]) -> DeviceRow:
    """As many of the allowed cores as the CPU quota pays for, and the memory beside them."""
    quota = cpu_quota(root)
    cores = allowed if quota is None else allowed[: max(1, int(quota))]
    found = memory(root)
    detail = f"{len(cores)} of {len(allowed)} cores"
    if quota is not None:
        detail += f", quota {quota:g}"
    return DeviceRow(
        name="cpu",
        kind="cpu",
        cores=cores,
        memory_bytes=found.bytes_max,
        detail=f"{detail}, {found.bytes_free >> 20} MiB free",
    )


def cpu_quota(root: Path) -> float | None:
    """CPUs' worth of time allowed by the tightest group above us; None where there is no quota."""
    read = _quota_unified if cgroup.is_unified(root, "cpu") else _quota_v1
    quotas = (read(folder) for folder in cgroup.folders(root, "cpu"))
    return min((quota for quota in quotas if quota is not None), default=None)


def memory(root: Path) -> Memory:
    """The installed memory, cut down by each group above us."""
    installed = _installed(root)
    bytes_max, bytes_free = installed.bytes_max, installed.bytes_free
    unified = cgroup.is_unified(root, "memory")
    for folder in cgroup.folders(root, "memory"):
        limit = _limit(folder, unified=unified)
        if limit is not None:
            used = _used(folder, unified=unified)
            bytes_max = min(bytes_max, limit)
            bytes_free = min(bytes_free, max(0, limit - used))
    return Memory(bytes_max, min(bytes_free, bytes_max))


def gpus(nvml: Any, cores: list[int]) -> list[DeviceRow]:  # Any: pynvml has no types
    """Each NVIDIA GPU; none where the library, the driver or a right is missing."""
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return []
    try:
        return list(_gpus(nvml, cores))
    except nvml.NVMLError:
        return []
    finally:
        nvml.nvmlShutdown()


def _gpus(nvml: Any, cores: list[int]) -> Iterator[DeviceRow]:  # Any: pynvml has no types
    for index in range(nvml.nvmlDeviceGetCount()):
        try:
            device = nvml.nvmlDeviceGetHandleByIndex(index)
            total = int(nvml.nvmlDeviceGetMemoryInfo(device).total)
            name, uuid = _text(nvml.nvmlDeviceGetName(device)), nvml.nvmlDeviceGetUUID(device)
        except nvml.NVMLError:
            continue  # lost, or not ours
        yield DeviceRow(
            name=f"cuda:{index}",
            kind="cuda",
            cores=cores,
            memory_bytes=total,
            detail=f"{name} {_text(uuid)}",
        )


def _text(value: bytes | str) -> str:
    """Older bindings give bytes."""
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def _quota_unified(folder: Path) -> float | None:
    """cpu.max: `max 100000` or `150000 100000`."""
    parts = cgroup.read_text(folder / "cpu.max").split()
    if len(parts) != 2 or not all(part.isdigit() for part in parts) or int(parts[1]) == 0:
        return None
    return int(parts[0]) / int(parts[1])


def _quota_v1(folder: Path) -> float | None:
    """A quota of -1 is none, and no number to `read_number`."""
    quota = cgroup.read_number(folder / "cpu.cfs_quota_us")
    period = cgroup.read_number(folder / "cpu.cfs_period_us")
    return quota / period if quota and period else None


def _limit(folder: Path, *, unified: bool) -> int | None:
    names = ("memory.max", "memory.high") if unified else ("memory.limit_in_bytes",)
    found = (cgroup.read_number(folder / name) for name in names)
    return min((n for n in found if n is not None and n < UNLIMITED_FROM), default=None)


def _used(folder: Path, *, unified: bool) -> int:
    """Without the file pages that the system would drop first."""
    usage, pages = (
        ("memory.current", "inactive_file")
        if unified
        else ("memory.usage_in_bytes", "total_inactive_file")
    )
    droppable = cgroup.read_fields(folder / "memory.stat").get(pages, 0)
    return max(0, (cgroup.read_number(folder / usage) or 0) - droppable)


def _installed(root: Path) -> Memory:
    rows = (line.split() for line in cgroup.read_text(root / "proc/meminfo").splitlines())
    kilobytes = {row[0]: int(row[1]) for row in rows if len(row) >= 2 and row[1].isdigit()}
    if "MemTotal:" in kilobytes:
        total = kilobytes["MemTotal:"] << 10
        return Memory(total, kilobytes.get("MemAvailable:", kilobytes["MemTotal:"]) << 10)
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return Memory(total, total)
