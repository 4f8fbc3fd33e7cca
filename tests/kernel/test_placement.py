"""Where a process goes."""

from hypothesis import given
from hypothesis import strategies as st
from llmkernel.placement import Demand, NoRoom, place
from llmproto.operation import DeviceRow, Lease

CPU = DeviceRow(name="cpu0", kind="cpu", cores=[0, 1, 2], memory_bytes=100)
GPU = DeviceRow(name="gpu0", kind="cuda", cores=[3], memory_bytes=50)


def test_accelerators_first_then_whatever_has_room() -> None:
    assert place([CPU, GPU], {}, Demand(50)) == Lease("gpu0", [3], 50)
    assert place([CPU, GPU], {"gpu0": 1}, Demand(50, cores=2)) == Lease("cpu0", [0, 1], 50)


def test_no_room_says_what_there_is() -> None:
    assert place([CPU, GPU], {"cpu0": 90}, Demand(60)) == NoRoom(60, 50, 100, True)
    assert place([CPU, GPU], {}, Demand(101)) == NoRoom(101, 100, 100, False)
    assert place([], {}, Demand(1)) == NoRoom(1, 0, 0, False)


@given(st.lists(st.integers(1, 100), max_size=5), st.integers(1, 120), st.integers(0, 100))
def test_nothing_is_granted_twice(sizes: list[int], wanted: int, granted: int) -> None:
    devices = [DeviceRow(str(i), "cpu", [i], size) for i, size in enumerate(sizes)]
    taken = {device.name: granted for device in devices}
    found = place(devices, taken, Demand(wanted))
    if isinstance(found, Lease):
        assert granted + wanted <= sizes[int(found.device)]
    else:
        assert all(granted + wanted > size for size in sizes)
        assert found.ever == any(wanted <= size for size in sizes)
