"""Where a process goes: a pure function of devices and demands (first fit; other searches fit
behind the same signature)."""

from collections.abc import Mapping, Sequence

import msgspec
from llmproto.operation import DeviceRow, Lease


class Demand(msgspec.Struct, frozen=True):
    """What a process asks for."""

    memory_bytes: int
    cores: int | None = None
    """Absent: all cores of the device (executors share them; the kernel's queue keeps order)."""


class NoRoom(msgspec.Struct, frozen=True):
    """Nothing fits now, or ever."""

    needed_bytes: int
    free_bytes: int
    """On the device with most of it free."""
    largest_bytes: int
    """Of the largest device, when empty."""
    ever: bool
    """It would fit on an empty device."""


def place(
    devices: Sequence[DeviceRow], granted: Mapping[str, int], demand: Demand
) -> Lease | NoRoom:
    """The first device with room, accelerators first.  `granted` is memory by device name."""
    best_free = largest = 0
    for device in sorted(devices, key=lambda d: d.kind == "cpu"):
        free = device.memory_bytes - granted.get(device.name, 0)
        if demand.memory_bytes <= free:
            cores = device.cores if demand.cores is None else device.cores[: demand.cores]
            return Lease(device=device.name, cores=list(cores), memory_bytes=demand.memory_bytes)
        best_free = max(best_free, free)
        largest = max(largest, device.memory_bytes)
    return NoRoom(
        needed_bytes=demand.memory_bytes,
        free_bytes=best_free,
        largest_bytes=largest,
        ever=demand.memory_bytes <= largest,
    )
