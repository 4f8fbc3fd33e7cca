"""Where a process goes: a pure function of devices and demands (first fit; other searches fit
behind the same signature)."""

from collections.abc import Iterator, Mapping, Sequence

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


class Ranks(msgspec.Struct, frozen=True):
    """What the processes of one job ask for together."""

    processes: int
    memory_bytes: int
    """Of each."""
    cores: int | None = None
    """Of each.  Absent: half of the device's, shared between them."""
    device: str | None = None

    def cores_each(self, device: DeviceRow) -> int:
        """How many each gets there."""
        return self.cores or max(1, len(device.cores) // 2 // self.processes)


class Misfit(msgspec.Struct, frozen=True):
    """The ranks of a job do not fit."""

    detail: str
    """With the numbers that do not fit."""
    ever: bool
    """They would fit if nobody else were there."""
    short_of: str | None = None
    """The device that has memory enough, if less of it were held."""


def place_ranks(
    devices: Sequence[DeviceRow],
    granted: Mapping[str, int],
    busy: Mapping[int, int],
    ranks: Ranks,
) -> list[Lease] | Misfit:
    """A lease for each rank, all on one kind of device: accelerators first, one for each rank, then
    a processor for all of them.

    `granted` is memory by device name; `busy` how many processes of jobs each core has.  Jobs do
    not share cores with each other, but where one alone has more processes than there are cores;
    with executors they do, and take their cores from the other end.
    """
    misfit = Misfit(f"there is no device {ranks.device!r}", ever=False)
    for group in _groups(devices, ranks):
        found = _fit(group, granted, busy, ranks)
        if isinstance(found, list):
            return found
        misfit = found if found.ever or not misfit.ever else misfit
    return misfit


def _groups(devices: Sequence[DeviceRow], ranks: Ranks) -> Iterator[list[DeviceRow]]:
    """Candidates in order: the device of each rank."""
    count = ranks.processes
    if ranks.device is not None:
        for device in devices:
            if device.name == ranks.device:
                yield [device] * count
        return
    others = [device for device in devices if device.kind != "cpu"]
    for first in range(len(others) - count + 1):
        yield others[first : first + count]
    for device in devices:
        if device.kind == "cpu":
            yield [device] * count


def _fit(
    group: list[DeviceRow], granted: Mapping[str, int], busy: Mapping[int, int], ranks: Ranks
) -> list[Lease] | Misfit:
    here = {device.name: device for device in group}
    asked = {name: sum(d.name == name for d in group) * ranks.memory_bytes for name in here}
    for name, device in here.items():
        free = max(0, device.memory_bytes - granted.get(name, 0))
        if asked[name] > free:
            ever = asked[name] <= device.memory_bytes
            has = f"{device.memory_bytes}" + (f", {free} of them free" if ever else "")
            detail = f"{asked[name]} bytes of memory are asked for; {name} has {has}"
            return Misfit(detail, ever, short_of=name if ever else None)
    cores = group[0].cores
    each = ranks.cores_each(group[0])
    if ranks.cores is not None and each * len(group) > len(cores):
        wanted = f"{len(group)} x {each} cores are asked for"
        return Misfit(f"{wanted}; {group[0].name} has {len(cores)}", ever=False)
    wanted_cores = min(each * len(group), len(cores))
    idle = [core for core in cores if not busy.get(core)]
    if len(idle) < wanted_cores:
        has = f"{len(idle)} of its {len(cores)} are free of other jobs"
        return Misfit(f"{wanted_cores} cores are asked for; of {group[0].name} {has}", ever=True)
    taken = idle[len(idle) - wanted_cores :]
    leases = []
    for rank, device in enumerate(group):
        mine = sorted({taken[(rank * each + i) % len(taken)] for i in range(each)})
        leases.append(Lease(device=device.name, cores=mine, memory_bytes=ranks.memory_bytes))
    return leases
