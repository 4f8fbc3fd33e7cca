"""Jobs against a hostile world; a seed is a run.

`pytest tests/sim --seed N` replays one.  Ranks, kernel and connections die; the committed steps of
every job are those of its undisturbed twin, bit for bit, and so is what it makes.
"""

import pytest
from llmkernel.testkit.jobscenario import JobScenario
from llmkernel.testkit.scenario import Outcome

SEEDS = 400
CHUNK = 50
LONG_SEEDS = 20_000
LONG_CHUNK = 500


def played(number: int) -> Outcome:
    """One run; a failure says its seed."""
    try:
        return JobScenario(number).run()
    except BaseException as error:
        error.add_note(f"seed {number}: pytest tests/sim/test_jobs.py --seed {number}")
        raise


def test_the_seed_that_was_asked_for(seed: int | None) -> None:
    if seed is None:
        pytest.skip("no --seed")
    assert played(seed).events > 0


@pytest.mark.parametrize("first", range(0, SEEDS, CHUNK))
def test_jobs_survive_everything(first: int, seed: int | None) -> None:
    if seed is not None:
        pytest.skip("--seed")
    events = sum(played(number).events for number in range(first, first + CHUNK))
    assert events >= 100 * CHUNK


@pytest.mark.parametrize("number", [0, 1, 2])
def test_the_same_seed_is_the_same_run(number: int) -> None:
    assert played(number) == played(number)


@pytest.mark.long
@pytest.mark.parametrize("first", range(SEEDS, LONG_SEEDS, LONG_CHUNK))
def test_many_jobs_survive_everything(first: int) -> None:
    events = sum(played(number).events for number in range(first, first + LONG_CHUNK))
    assert events >= 100 * LONG_CHUNK
