import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st
from llmservices.executor.planner import Candidate, Chunk, Plan, plan


def thread(
    residency: int,
    known: int,
    *,
    computed: int = 0,
    blocks: int = 0,
    service_class: int = 1,
    priority: int = 0,
    allowed: bool = True,
    chunk_tokens_max: int | None = None,
) -> Candidate:
    return Candidate(
        residency,
        service_class,
        priority,
        residency,
        computed,
        known,
        blocks,
        blocks,
        allowed,
        chunk_tokens_max,
    )


def planned(*threads: Candidate, free: int = 100, rows: int = 8, beside: int | None = None) -> Plan:
    return plan(threads, blocks_free=free, block_tokens=4, step_tokens=rows, beside_tokens=beside)


def test_decodes_come_first_and_leave_the_rest_of_the_rows_to_prefills() -> None:
    assert planned(thread(1, 20), thread(2, 5, computed=4, blocks=1)) == Plan(
        [Chunk(2, 4, 1), Chunk(1, 0, 7)], []
    )


def test_less_of_a_prompt_goes_beside_decodes() -> None:
    decode = thread(2, 5, computed=4, blocks=1)
    assert planned(thread(1, 60), decode, rows=40, beside=10).chunks[-1] == Chunk(1, 0, 10)
    assert planned(thread(1, 60), decode, rows=40, beside=50).chunks[-1] == Chunk(1, 0, 39)
    assert planned(thread(1, 60), decode, rows=40, beside=0).chunks[-1] == Chunk(1, 0, 4)
    assert planned(thread(1, 60), rows=40, beside=10).chunks == [Chunk(1, 0, 40)]


def test_a_prefill_moves_on_however_many_decodes_there_are() -> None:
    decodes = [thread(i, 5, computed=4, blocks=2) for i in range(10, 30)]
    assert planned(thread(1, 20), *decodes).chunks[-1] == Chunk(1, 0, 4)


def test_class_then_priority_then_age() -> None:
    assert planned(
        thread(1, 8),
        thread(2, 8, priority=1),
        thread(3, 8, service_class=0, priority=-8),
        rows=20,
    ).chunks == [Chunk(3, 0, 8), Chunk(2, 0, 8), Chunk(1, 0, 4)]


def test_a_thread_too_far_ahead_is_not_planned() -> None:
    assert planned(thread(1, 8, allowed=False)) == Plan([], [])


def test_a_bounded_chunk() -> None:
    assert planned(thread(1, 8, chunk_tokens_max=3)).chunks == [Chunk(1, 0, 3)]


def test_out_of_blocks_the_youngest_of_the_lowest_class_gives_back() -> None:
    assert planned(
        thread(1, 5, computed=4, blocks=1),
        thread(2, 8, computed=7, blocks=2),
        thread(3, 8, computed=7, blocks=2, service_class=0),
        free=0,
    ) == Plan([Chunk(3, 7, 1), Chunk(1, 4, 1)], [2])


def test_nobody_takes_from_a_better_one() -> None:
    assert planned(
        thread(1, 8, computed=7, blocks=2), thread(2, 5, computed=4, blocks=1), free=0
    ) == Plan([Chunk(1, 7, 1)], [], waiting=(1, 0, 2))


def test_a_prefill_takes_the_blocks_that_there_are() -> None:
    assert planned(thread(1, 30), free=1, rows=30) == Plan([Chunk(1, 0, 4)], [])


class Load(msgspec.Struct, frozen=True):
    prompt: int
    output: int
    service_class: int
    priority: int


loads = st.lists(
    st.builds(Load, st.integers(1, 30), st.integers(1, 10), st.integers(0, 1), st.integers(0, 1)),
    min_size=1,
    max_size=8,
)


@settings(deadline=None)
@given(loads=loads, spare=st.integers(0, 12), rows=st.integers(1, 40))
def test_every_thread_that_fits_alone_ends(loads: list[Load], spare: int, rows: int) -> None:
    """Given back threads return as the youngest, with what they had computed lost."""
    total = max(-(-(load.prompt + load.output) // 4) for load in loads) + spare
    ages = iter(range(10_000))
    running = {
        next(ages): (load, load.prompt, 0, 0) for load in loads
    }  # age -> load, known, computed, blocks
    work = sum(load.prompt + load.output for load in loads)
    steps = 0
    while running:
        free = total - sum(blocks for *_, blocks in running.values())
        assert free >= 0
        step = plan(
            [
                Candidate(age, load.service_class, load.priority, age, computed, known, held, held)
                for age, (load, known, computed, held) in running.items()
            ],
            blocks_free=free,
            block_tokens=4,
            step_tokens=rows,
        )
        first = min(
            running, key=lambda age: (running[age][0].service_class, -running[age][0].priority, age)
        )
        assert first in {chunk.residency for chunk in step.chunks}
        assert not {chunk.residency for chunk in step.chunks} & set(step.give_back)
        assert sum(chunk.tokens for chunk in step.chunks if chunk.tokens > 1) <= max(rows, 4)
        for age in step.give_back:
            load, known, _, _ = running.pop(age)
            running[next(ages)] = (load, known, 0, 0)
        for chunk in step.chunks:
            load, known, computed, held = running.pop(chunk.residency)
            assert chunk.start == computed
            computed += chunk.tokens
            assert computed <= known
            if computed == known:
                known += 1
            if known <= load.prompt + load.output:
                running[chunk.residency] = (load, known, computed, max(held, -(-computed // 4)))
        steps += 1
        assert steps <= 40 * work
