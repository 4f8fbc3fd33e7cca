"""Kernel and sessions against a hostile world; a seed is a run.

`pytest tests/sim --seed N` replays one.  Every stream ends complete and equal to its undisturbed
twin, nothing is left anywhere, and the same seed gives the same effects byte for byte.
"""

import gc

import pytest
from llmkernel.testkit.scenario import Outcome, Scenario

SEEDS = 1_000
CHUNK = 50
SWAPPED_SEEDS = 100
LONG_SEEDS = 100_000
LONG_CHUNK = 500
FOUND = {
    17: "a stream was read to its end before its Accepted arrived: its repetition was STALE",
    51: "a stopped tokenizer was noticed only a minute after the kernel's restart",
    61: "an acknowledgement was lost while the sink was away: the thread stayed paused",
    69: "the same, with a kernel that forgot what was acknowledged",
    159: "a request that was never answered stayed in the table",
    189: "an executor whose ExecutorReady was lost was never ready and never killed",
    1633: "a choice that was cancelled with its refused siblings came back when they were repeated",
}
"""What seeds have found; scenarios grow and change what a seed does, so each has its own core test
beside."""


def played(number: int) -> Outcome:
    """One run; a failure says its seed."""
    try:
        return Scenario(number).run()
    except BaseException as error:
        error.add_note(f"seed {number}: pytest tests/sim --seed {number}")
        raise


def test_the_seed_that_was_asked_for(seed: int | None) -> None:
    if seed is None:
        pytest.skip("no --seed")
    assert played(seed).events > 0


@pytest.mark.parametrize("first", range(0, SEEDS, CHUNK))
def test_streams_survive_everything(first: int, seed: int | None) -> None:
    if seed is not None:
        pytest.skip("--seed")
    events = sum(played(number).events for number in range(first, first + CHUNK))
    assert events >= 200 * CHUNK


@pytest.mark.parametrize("number", FOUND)
def test_seeds_that_found_something(number: int) -> None:
    assert played(number).events > 0


def swapped(number: int) -> Outcome:
    """One run in which a store swaps versions."""
    try:
        return Scenario(number, deployments=True).run()
    except BaseException as error:
        error.add_note(f"seed {number} with deployments")
        raise


@pytest.mark.parametrize("first", range(0, SWAPPED_SEEDS, CHUNK))
def test_streams_survive_swaps_too(first: int, seed: int | None) -> None:
    if seed is not None:
        pytest.skip("--seed")
    events = sum(swapped(number).events for number in range(first, first + CHUNK))
    assert events >= 200 * CHUNK


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("first", range(SWAPPED_SEEDS, LONG_SEEDS // 4, LONG_CHUNK))
def test_many_more_swaps(first: int) -> None:
    for number in range(first, first + LONG_CHUNK):
        assert swapped(number).events > 0
        if number % CHUNK == 0:
            gc.collect()


def test_the_same_seed_gives_the_same_effects() -> None:
    for number in range(20):
        first = played(number)
        gc.collect()
        assert played(number) == first, number


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("first", range(SEEDS, LONG_SEEDS, LONG_CHUNK))
def test_many_more_seeds(first: int) -> None:
    for number in range(first, first + LONG_CHUNK):
        assert played(number).events > 0
        if number % CHUNK == 0:
            gc.collect()
