"""Where a process goes."""

from hypothesis import given
from hypothesis import strategies as st
from llmkernel.placement import Demand, Misfit, NoRoom, Ranks, place, place_ranks
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


# --- the ranks of a job ---------------------------------------------------------------------------

EIGHT = DeviceRow(name="cpu0", kind="cpu", cores=list(range(8)), memory_bytes=100)
GPUS = tuple(
    DeviceRow(name=f"cuda:{n}", kind="cuda", cores=list(range(8)), memory_bytes=50)
    for n in range(2)
)


def leases(found: list[Lease] | Misfit) -> list[tuple[str, list[int]]]:
    assert isinstance(found, list), found
    return [(lease.device, lease.cores) for lease in found]


def test_half_of_the_cores_from_the_far_end() -> None:
    assert leases(place_ranks((EIGHT,), {}, {}, Ranks(1, 10))) == [("cpu0", [4, 5, 6, 7])]
    assert leases(place_ranks((EIGHT,), {}, {}, Ranks(2, 10))) == [
        ("cpu0", [4, 5]),
        ("cpu0", [6, 7]),
    ]
    assert leases(place_ranks((EIGHT,), {}, {7: 1}, Ranks(1, 10, cores=2))) == [("cpu0", [5, 6])]


def test_more_ranks_than_cores_share_them_unless_cores_were_asked_for() -> None:
    two = DeviceRow(name="cpu0", kind="cpu", cores=[0, 1], memory_bytes=100)
    assert leases(place_ranks((two,), {}, {}, Ranks(4, 10))) == [
        ("cpu0", [0]),
        ("cpu0", [1]),
        ("cpu0", [0]),
        ("cpu0", [1]),
    ]
    found = place_ranks((two,), {}, {}, Ranks(4, 10, cores=1))
    assert found == Misfit("4 x 1 cores are asked for; cpu0 has 2", ever=False)


def test_one_accelerator_for_each_rank_else_the_processor() -> None:
    every = (EIGHT, *GPUS)
    assert [d for d, _ in leases(place_ranks(every, {}, {}, Ranks(1, 10)))] == ["cuda:0"]
    assert [d for d, _ in leases(place_ranks(every, {"cuda:0": 45}, {}, Ranks(1, 10)))] == [
        "cuda:1"
    ]
    assert [d for d, _ in leases(place_ranks(every, {}, {}, Ranks(2, 10)))] == ["cuda:0", "cuda:1"]
    assert [d for d, _ in leases(place_ranks(every, {}, {}, Ranks(3, 10)))] == ["cpu0"] * 3
    named = Ranks(2, 10, device="cuda:1")
    assert [d for d, _ in leases(place_ranks(every, {}, {}, named))] == ["cuda:1", "cuda:1"]


def test_what_is_missing_is_said() -> None:
    found = place_ranks((EIGHT,), {"cpu0": 60}, {}, Ranks(2, 25))
    detail = "50 bytes of memory are asked for; cpu0 has 100, 40 of them free"
    assert found == Misfit(detail, ever=True, short_of="cpu0")
    found = place_ranks((EIGHT,), {}, {}, Ranks(3, 40))
    assert found == Misfit("120 bytes of memory are asked for; cpu0 has 100", ever=False)
    found = place_ranks((EIGHT,), {}, dict.fromkeys(range(6), 1), Ranks(1, 10))
    detail = "4 cores are asked for; of cpu0 2 of its 8 are free of other jobs"
    assert found == Misfit(detail, ever=True)
    # The largest device could, some day: that is what is waited for.
    found = place_ranks((EIGHT, *GPUS), {"cpu0": 60}, {}, Ranks(1, 60))
    assert isinstance(found, Misfit) and found.ever
