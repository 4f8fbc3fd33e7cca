"""What a step may take follows what steps took."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from llmproto import limits
from llmservices.executor.costs import SAFETY, UNKNOWN_MS, PromptCosts, StepCosts, announced_ms


def fitted(*steps: tuple[int, float]) -> StepCosts:
    costs = StepCosts()
    for rows, seconds in steps:
        costs.add(rows, seconds)
    return costs


def test_the_line_is_found() -> None:
    costs = fitted((1, 0.011), (10, 0.020), (512, 0.522), (32, 0.042))
    assert list(costs.line) == pytest.approx([0.010, 0.001])
    assert costs.budget_ms(100) == pytest.approx(1000 * SAFETY * 0.110, abs=1)


def test_steps_of_one_size_are_all_base() -> None:
    assert list(fitted((4, 0.02), (4, 0.04)).line) == pytest.approx([0.03, 0.0], rel=0.02)


def test_nothing_is_promised_of_what_was_never_seen() -> None:
    assert StepCosts().line == (0.0, 0.0)
    assert StepCosts().budget_ms(1) == UNKNOWN_MS
    assert fitted((4, 0.001)).budget_ms(512) == UNKNOWN_MS


def test_only_long_steps_are_announced() -> None:
    quick = fitted((1, 0.001), (32, 0.010))
    assert announced_ms(quick, 100) is None
    slow = fitted((1, 0.1), (32, 3.2))
    assert announced_ms(slow, 512) == slow.budget_ms(512) > limits.STEP_BUDGET_MS
    assert announced_ms(slow, 1) is None


def test_a_machine_that_became_slower_is_believed() -> None:
    costs = fitted(*[(8, 0.01)] * 50, *[(8, 1.0)] * 200)
    assert costs.budget_ms(8) > 3900


@given(st.lists(st.tuples(st.integers(1, 512), st.floats(0, 100)), min_size=1, max_size=30))
def test_more_rows_never_cost_less(steps: list[tuple[int, float]]) -> None:
    costs = fitted(*steps)
    base, slope = costs.line
    assert base >= 0 and slope >= 0
    budgets = [costs.budget_ms(rows) for rows in (1, 10, 100)]
    known = [budget for budget in budgets if budget != UNKNOWN_MS]
    assert known == sorted(known)
    assert all(0 <= budget <= limits.WORKING_MS_MAX for budget in budgets)


def test_what_of_a_prompt_fits_beside_answers() -> None:
    pace = PromptCosts()
    assert pace.rows_within(0.1) is None
    pace.add(0, 0.020)
    assert pace.rows_within(0.1) is None
    pace.add(400, 0.420)
    assert pace.rows_within(0.1) == 80
    assert pace.rows_within(0.001) == 20  # as much again as a step without it


def test_the_price_of_a_row_is_remembered_while_no_prompt_comes() -> None:
    pace = PromptCosts()
    pace.add(100, 0.110)
    for _ in range(500):
        pace.add(0, 0.010)
    assert pace.rows_within(0.120) == pytest.approx(100, rel=0.01)
