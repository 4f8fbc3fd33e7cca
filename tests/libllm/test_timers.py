"""Timers against a dict that is searched."""

from hypothesis import given
from hypothesis import strategies as st
from libllm.timers import Timer, Timers

KEYS = [Timer("request", bytes((number,))) for number in range(4)]
STEPS = st.lists(
    st.tuples(st.sampled_from(["set", "drop", "take"]), st.sampled_from(KEYS), st.integers(0, 50)),
    max_size=300,
)


@given(STEPS)
def test_timers_fire_once_when_due_and_not_before(steps: list[tuple[str, Timer, int]]) -> None:
    timers = Timers()
    model: dict[Timer, int] = {}
    now_ns = 0
    for what, key, number in steps:
        if what == "set":
            timers.set(key, now_ns + number)
            model[key] = now_ns + number
        elif what == "drop":
            timers.drop(key)
            model.pop(key, None)
        else:
            now_ns += number
            due = {key for key, at_ns in model.items() if at_ns <= now_ns}
            taken = timers.take_due(now_ns)
            assert set(taken) == due and len(taken) == len(due)
            for key in due:
                del model[key]
        timers.check()
        assert timers.next_ns() == min(model.values(), default=None)


def test_a_timer_that_is_moved_later_all_the_time_takes_no_memory() -> None:
    timers = Timers()
    for at_ns in range(10_000):
        timers.set(KEYS[0], at_ns)
    timers.check()
    assert timers.take_due(20_000) == [KEYS[0]]


def test_a_timer_that_is_moved_earlier_and_later_stays_bounded() -> None:
    timers = Timers()
    for number in range(10_000):
        timers.set(KEYS[0], 1_000_000 - number if number % 2 else 2_000_000)
        timers.check()
