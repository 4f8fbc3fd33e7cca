"""The guilty are found within few deaths, the innocent are never ended."""

import math

from hypothesis import given
from hypothesis import strategies as st
from llmkernel.poison import Poison
from llmproto import limits


class Machine:
    """An executor that runs what the poison table allows, and dies of what is guilty.

    One round: the threads that may run together compute one position each, all in one step, and
    those that survive commit it.
    """

    def __init__(self, threads: int, guilty: list[frozenset[int]], room: int) -> None:
        self.poison = Poison()
        self.left = {bytes((i, 0)): 4 for i in range(threads)}
        """Positions that each thread still has to compute."""
        self.guilty = [frozenset(bytes((i, 0)) for i in group) for group in guilty]
        self.room = room
        self.deaths = 0
        self.ended: list[bytes] = []

    def batch(self) -> list[bytes]:
        trial = self.poison.current
        if trial is not None:
            return list(trial)
        batch: list[bytes] = []
        for thread in self.left:
            enemies = self.poison.enemies(thread)
            if len(batch) < self.room and not any(other in enemies for other in batch):
                batch.append(thread)
        return batch

    def round(self, *, killed: bool = False) -> None:
        batch = self.batch()
        self.poison.check()
        if killed:
            return
        if any(group <= set(batch) for group in self.guilty):
            self.deaths += 1
            for thread in self.poison.died({t: 4 - self.left[t] for t in batch}):
                self.ended.append(thread)
                del self.left[thread]
            self.poison.check()
            return
        for thread in batch:
            self.poison.committed(thread)
            self.poison.check()
            self.left[thread] -= 1
            if not self.left[thread]:
                del self.left[thread]
                self.poison.forget(thread)
                self.poison.check()

    def run(self, kills: list[int] | None = None) -> None:
        rounds = 0
        while self.left:
            self.round(killed=rounds in (kills or []))
            rounds += 1
            assert rounds < 3000, (self.poison.trials, self.left)


@given(st.integers(1, 64), st.data())
def test_one_guilty_thread_is_ended_and_nobody_else(threads: int, data: st.DataObject) -> None:
    guilty = data.draw(st.integers(0, threads - 1))
    room = data.draw(st.integers(1, 64))
    machine = Machine(threads, [frozenset({guilty})], room)
    machine.run()
    assert machine.ended == [bytes((guilty, 0))]
    assert machine.deaths <= math.ceil(math.log2(max(2, min(room, threads)))) + limits.STRIKES_MAX


@given(st.integers(2, 40), st.data())
def test_several_guilty_threads_are_all_ended(threads: int, data: st.DataObject) -> None:
    guilty = data.draw(st.lists(st.integers(0, threads - 1), min_size=1, max_size=4, unique=True))
    machine = Machine(threads, [frozenset({one}) for one in guilty], 64)
    machine.run()
    assert sorted(machine.ended) == sorted(bytes((one, 0)) for one in guilty)
    assert machine.deaths <= len(guilty) * (math.ceil(math.log2(threads)) + limits.STRIKES_MAX)


@given(st.integers(2, 32), st.data())
def test_a_pair_that_crashes_only_together_is_kept_apart(threads: int, data: st.DataObject) -> None:
    pair = data.draw(st.lists(st.integers(0, threads - 1), min_size=2, max_size=2, unique=True))
    machine = Machine(threads, [frozenset(pair)], 64)
    machine.run()
    assert machine.ended == []
    assert machine.deaths <= 2 * math.ceil(math.log2(threads)) + 2


@given(
    st.integers(1, 32),
    st.lists(st.integers(0, 200), max_size=50),
    st.lists(st.integers(0, 31), max_size=2, unique=True),
)
def test_kills_from_outside_change_nothing(
    threads: int, kills: list[int], guilty: list[int]
) -> None:
    guilty = [one for one in guilty if one < threads]
    machine = Machine(threads, [frozenset({one}) for one in guilty], 64)
    machine.run(kills)
    assert sorted(machine.ended) == sorted(bytes((one, 0)) for one in guilty)


NAMES = st.sampled_from([bytes((i,)) for i in range(6)])
CALLS = st.one_of(
    st.tuples(st.just("died"), st.dictionaries(NAMES, st.integers(0, 2), max_size=6)),
    st.tuples(st.sampled_from(["committed", "forget", "withdraw"]), NAMES),
)


@given(st.lists(CALLS, max_size=30))
def test_any_order_of_calls_keeps_the_invariant(
    calls: list[tuple[str, dict[bytes, int] | bytes]],
) -> None:
    poison = Poison()
    for what, argument in calls:
        if isinstance(argument, dict):
            poison.died(argument)
        elif what == "committed":
            poison.committed(argument)
        elif what == "forget":
            poison.forget(argument)
        else:
            poison.withdraw(argument)
        poison.check()


def test_a_thread_that_commits_between_its_deaths_ends_all_the_same() -> None:
    poison = Poison()
    ended: list[bytes] = []
    deaths = 0
    while not ended:
        deaths += 1
        ended = poison.died({b"a": deaths})
        poison.committed(b"a")
    assert (ended, deaths) == ([b"a"], limits.ALONE_DEATHS_MAX)
