"""Which kernel rules when, as a table; and the phases of the end."""

import socket

from hypothesis import given
from hypothesis import strategies as st
from llmkernel.init.kernels import SILENT_S, STABLE_S, STANDBY_AFTER_S, Kernels, Seat
from llmkernel.init.stop import STOP_GRACE_S, TERMINATE_GRACE_S, Phase, Stopping
from llmkernel.initlink import Link
from llmproto import limits


def seat(pid: int) -> Seat:
    """A kernel whose link leads nowhere."""
    end, other = socket.socketpair()
    other.close()
    link = Link(end)
    link.close()
    return Seat(pid, link)


def ruled_by(pid: int, now_s: float = 0.0) -> Kernels:
    kernels = Kernels()
    kernels.seated(seat(pid), now_s)
    return kernels


def test_the_first_kernel_is_due_at_once() -> None:
    kernels = Kernels()
    assert kernels.due_s == kernels.next_s() == 0.0
    kernels.seated(seat(1), 5.0)
    assert kernels.due_s is None
    assert kernels.promotions == 1
    assert kernels.standby_due_s == 5.0 + STANDBY_AFTER_S == kernels.next_s()


def test_starting_processes_puts_the_standby_off() -> None:
    kernels = ruled_by(1)
    kernels.busy(9.0)
    assert kernels.standby_due_s == 9.0 + STANDBY_AFTER_S
    kernels.stands_by(seat(2))
    kernels.busy(10.0)
    assert kernels.standby_due_s is None
    assert kernels.next_s() == SILENT_S


def test_silence_counts_from_the_last_word_and_not_while_init_slept() -> None:
    kernels = ruled_by(1, 10.0)
    ruling = kernels.ruling
    assert ruling is not None
    assert not kernels.silent(10.0 + SILENT_S - 0.001)
    assert kernels.silent(10.0 + SILENT_S)
    kernels.heard(ruling, 11.0)
    assert not kernels.silent(10.0 + SILENT_S)
    kernels.clock_gap(30.0)
    assert not kernels.silent(41.0)
    assert kernels.silent(41.0 + SILENT_S)
    ruling.killed = True
    assert not kernels.silent(99.0)


def test_a_standby_takes_over_at_once() -> None:
    kernels = ruled_by(1)
    kernels.stands_by(seat(2))
    assert kernels.died(1, 0.1) is not None
    assert kernels.ruling is None
    assert kernels.due_s == 0.1
    standby = kernels.take_standby()
    assert standby is not None and standby.pid == 2
    assert kernels.take_standby() is None


def test_back_off_doubles_to_its_limit_and_is_forgotten() -> None:
    kernels = Kernels()
    delays, now_s = [], 0.0
    for pid in range(1, 11):
        kernels.seated(seat(pid), now_s)
        kernels.died(pid, now_s)
        assert kernels.due_s is not None
        delays.append(round((kernels.due_s - now_s) * 1000))
        now_s = kernels.due_s
    first, most = limits.BACKOFF_MS_FIRST, limits.BACKOFF_MS_MAX
    assert delays[:5] == [0, first, 2 * first, 4 * first, 8 * first]
    assert delays[-1] == most
    kernels.seated(seat(11), now_s)
    kernels.died(11, now_s + STABLE_S + 1)
    assert kernels.due_s == now_s + STABLE_S + 1


def test_other_deaths_are_not_the_kernels() -> None:
    kernels = ruled_by(1)
    kernels.stands_by(seat(2))
    assert kernels.died(3, 1.0) is None
    assert kernels.died(2, 1.0) is not None
    assert kernels.standby is None
    assert kernels.standby_due_s == 1.0 + STANDBY_AFTER_S
    assert kernels.ruling is not None


def test_the_end_goes_phase_by_phase() -> None:
    stopping = Stopping()
    assert not stopping.asked
    assert stopping.ask(0.0)
    assert stopping.advance(STOP_GRACE_S - 0.1, kernel=1, living=3) is None
    assert stopping.advance(STOP_GRACE_S, kernel=1, living=3) is Phase.TERMINATING
    end_s = STOP_GRACE_S + TERMINATE_GRACE_S
    assert stopping.advance(end_s - 0.1, kernel=1, living=3) is None
    assert stopping.advance(end_s, kernel=1, living=3) is Phase.KILLING
    assert stopping.advance(end_s, kernel=None, living=1) is None
    assert stopping.advance(end_s, kernel=None, living=0) is Phase.ENDED


def test_halt_and_a_dead_kernel_shorten_it() -> None:
    halted = Stopping()
    halted.halt(1.0)
    assert halted.advance(1.0, kernel=1, living=1) is Phase.TERMINATING
    assert halted.advance(1.0, kernel=None, living=0) is Phase.ENDED
    alone = Stopping()
    alone.ask(1.0)
    assert alone.advance(1.0, kernel=None, living=0) is Phase.TERMINATING


def test_asked_twice_it_loses_patience() -> None:
    stopping = Stopping()
    assert stopping.ask(0.0)
    assert not stopping.ask(0.1)
    assert stopping.advance(0.1, kernel=1, living=1) is Phase.TERMINATING
    stopping.halt(0.2)
    assert not stopping.ask(0.2)
    assert stopping.advance(0.2, kernel=1, living=1) is Phase.KILLING


@given(st.lists(st.tuples(st.floats(0, 3), st.booleans(), st.integers(0, 2)), max_size=40))
def test_phases_only_move_forward(steps: list[tuple[float, bool, int]]) -> None:
    stopping, now_s = Stopping(), 0.0
    stopping.ask(now_s)
    begun: list[int] = []
    for step_s, kernel, living in steps:
        now_s += step_s
        phase = stopping.advance(now_s, kernel=1 if kernel else None, living=living)
        if phase is not None:
            begun.append(phase.value)
        if phase is Phase.ENDED:
            break
    assert begun == sorted(set(begun))
