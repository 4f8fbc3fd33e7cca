"""Facts of one event as one record."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from llmkernel import facts, turns
from llmkernel.facts import AnyFact, Booted, TenantSeen, ThreadsForgotten, TokensCommitted
from llmproto import limits

anything = st.one_of(
    st.builds(Booted, st.integers(0, 9), st.integers(0, 1 << 60), st.integers(0, 1 << 60)),
    st.builds(TenantSeen, st.integers(0, 99), st.text(max_size=20)),
    st.builds(
        TokensCommitted,
        st.lists(st.binary(min_size=8, max_size=8), max_size=3),
        st.lists(st.integers(0, 99), max_size=3),
        st.lists(st.integers(0, 99), max_size=3),
    ),
)


@given(st.lists(anything, max_size=6))
def test_the_facts_of_an_event_are_one_record(together: list[AnyFact]) -> None:
    records = turns.encode(together)
    assert len(records) == min(1, len(together))
    assert [fact for record in records for fact in turns.decode(record)] == together


def test_a_single_fact_is_written_as_ever() -> None:
    fact = Booted(1, 2, 3)
    assert turns.encode([fact]) == [facts.encode(fact)]


def test_a_fact_of_many_fields_is_not_taken_for_several() -> None:
    # An array of more than 15 begins with other bytes; the second may be 0.
    record = b"\xdc\x00\x10\x02"
    assert record[:2] != b"\x92\x00"


def test_what_does_not_fit_together_goes_alone() -> None:
    names = [bytes(8)] * (limits.RECORD_BYTES_MAX // 10 - 100)
    large = ThreadsForgotten(names, 1)
    records = turns.encode([large, large])
    assert [turns.decode(record) for record in records] == [[large], [large]]


def test_a_fact_that_is_no_record_is_refused_before_anything_is_written() -> None:
    names = [bytes(8)] * (limits.RECORD_BYTES_MAX // 10 + 1)
    with pytest.raises(AssertionError, match="bytes is no record"):
        turns.encode([Booted(1, 1, 1), ThreadsForgotten(names, 1)])
