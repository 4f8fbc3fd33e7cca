from collections.abc import Callable

import pytest
from llmproto import limits
from llmproto.errors import ErrorKind, RemoteError
from llmproto.generation import Sampling
from llmservices.executor.contract import (
    END_LENGTH,
    END_NONE,
    END_STOP,
    Admission,
    EngineConfig,
    Proposal,
    StepResult,
)
from llmservices.executor.core import Engine
from llmservices.models.decoder import Decoder

GREEDY = Sampling(temperature=0.0)


def admission(
    residency: int,
    tokens: list[int],
    *,
    output: int = 8,
    sampling: Sampling = GREEDY,
    prompt_tokens: int | None = None,
    service_class: int = 1,
    prompt_scores: bool = False,
    domain: bytes = b"",
) -> Admission:
    return Admission(
        thread=residency.to_bytes(8, "big"),
        residency=residency,
        tokens=tokens,
        prompt_tokens=prompt_tokens or len(tokens),
        output_tokens_max=output,
        sampling=sampling,
        service_class=service_class,
        prompt_scores=prompt_scores,
        domain=domain,
    )


def engine(model: Decoder, *, blocks: int = 64, rows: int = 64, residents: int = 32) -> Engine:
    return Engine(
        model,
        EngineConfig(
            blocks=blocks, block_tokens=4, step_tokens=rows, exact=True, residents_max=residents
        ),
    )


def run(
    subject: Engine, on_step: Callable[[StepResult], None] | None = None
) -> dict[int, list[Proposal]]:
    """Step until nothing is left to do, committing everything at once."""
    rows: dict[int, list[Proposal]] = {}
    while subject.runnable():
        result = subject.step()
        subject.check()
        for row in result.rows:
            rows.setdefault(row.residency, []).append(row)
            subject.watermark(row.residency, row.position)
        if on_step is not None:
            on_step(result)
    return rows


def tokens_of(rows: list[Proposal]) -> list[int | None]:
    return [row.token for row in rows]


def refusal(subject: Engine, wanted: Admission) -> RemoteError:
    with pytest.raises(RemoteError) as caught:
        subject.add(wanted)
    return caught.value


def test_positions_follow_the_prompt_and_the_last_row_ends_by_length(tiny: Decoder) -> None:
    rows = run(one := engine(tiny)) or {}
    assert not rows
    one.add(admission(1, [1, 2, 3], output=5))
    rows = run(one)
    assert [row.position for row in rows[1]] == [3, 4, 5, 6, 7]
    assert [row.end for row in rows[1]] == [END_NONE] * 4 + [END_LENGTH]
    assert one.blocks_free == 64
    assert one.residencies() == [1]
    one.drop(1)
    assert one.residencies() == []


def test_a_stop_token_is_proposed_with_its_end_unless_it_is_ignored(tiny: Decoder) -> None:
    one = engine(tiny)
    one.add(admission(1, [1, 2, 3]))
    free = tokens_of(run(one)[1])
    stop = free[3]
    assert stop is not None
    length = free.index(stop) + 1
    one.add(admission(2, [1, 2, 3], sampling=Sampling(temperature=0.0, stop_tokens=[stop])))
    stopped = run(one)[2]
    assert tokens_of(stopped) == free[:length]
    assert stopped[-1].end == END_STOP
    ignoring = Sampling(temperature=0.0, stop_tokens=[stop], ignore_eos=True)
    one.add(admission(3, [1, 2, 3], sampling=ignoring))
    assert tokens_of(run(one)[3]) == free


def test_a_thread_stays_within_its_steps_ahead(tiny: Decoder) -> None:
    one = engine(tiny)
    one.add(admission(1, [1, 2, 3], output=40))
    positions = []
    while one.runnable():
        positions += [row.position for row in one.step().rows]
    assert positions == list(range(3, 3 + limits.STEPS_AHEAD_MAX))
    one.watermark(1, 4)
    while one.runnable():
        positions += [row.position for row in one.step().rows]
    assert positions == list(range(3, 5 + limits.STEPS_AHEAD_MAX))
    assert [row.position for row in one.proposals_after(1, 6)] == positions[4:]
    assert [row.position for row in one.proposals_after(1, 0)] == positions[2:]
    assert one.proposals_after(9, 0) == []


def test_proposals_of_an_ended_thread_are_kept_until_it_is_dropped(tiny: Decoder) -> None:
    one = engine(tiny)
    one.add(admission(1, [1, 2, 3], output=2))
    while one.runnable():
        one.step()
    assert [row.position for row in one.proposals_after(1, 2)] == [3, 4]
    assert one.blocks_free == 64


def test_a_prompt_can_be_scored_alone(tiny: Decoder) -> None:
    prompt = [1, 2, 3, 4, 5, 6, 7]
    one = engine(tiny, rows=4)
    wanting = Sampling(temperature=0.0, logprobs=2)
    one.add(admission(1, prompt, output=0, sampling=wanting, prompt_scores=True))
    (row,) = run(one)[1]
    assert (row.position, row.token, row.end) == (7, None, END_LENGTH)
    assert row.prompt_scores is not None
    assert [score.token for score in row.prompt_scores] == prompt
    assert row.prompt_scores[0].logprob is None
    assert all(len(score.top_tokens) == 2 for score in row.prompt_scores[1:])
    # The score of a prompt's token is what the same token gets when it is generated.
    one.add(admission(2, prompt[:3], output=1, sampling=Sampling(temperature=0.0, logprobs=2)))
    (generated,) = run(one)[2]
    assert generated.score is not None
    assert generated.score.top_logprobs == row.prompt_scores[3].top_logprobs


def test_prompt_scores_come_with_the_first_token_only(tiny: Decoder) -> None:
    one = engine(tiny)
    one.add(admission(1, [5, 6, 7], output=3, prompt_scores=True))
    first, *others = run(one)[1]
    assert first.prompt_scores is not None
    assert len(first.prompt_scores) == 3
    assert all(row.prompt_scores is None for row in others)


def test_a_thread_without_room_for_output_ends_at_once(tiny: Decoder) -> None:
    one = engine(tiny)
    one.add(admission(1, [1, 2, 3, 4, 5], prompt_tokens=3, output=2))
    (row,) = run(one)[1]
    assert (row.position, row.token, row.end) == (5, None, END_LENGTH)


def test_the_context_is_never_exceeded(tiny: Decoder) -> None:
    one = engine(tiny)
    one.add(admission(1, [1] * 155, output=1000))
    rows = run(one)[1]
    assert [row.position for row in rows] == [155, 156, 157, 158, 159]
    assert rows[-1].end == END_LENGTH


def test_refusals_name_both_numbers(tiny: Decoder) -> None:
    one = engine(tiny, blocks=10, residents=1)
    assert one.context_tokens == 40
    for wanted, words in [
        (admission(1, [1] * 20, output=30), ("need 13 KV blocks", "has 10 (40 tokens)")),
        (admission(1, [1] * 160, output=1), ("160 tokens", "context of 160")),
        (admission(1, [1, 101]), ("token id 101", "ends at 100")),
        (admission(1, [-1]), ("token id -1",)),
        (admission(1, [1, 2], prompt_tokens=3), ("3 prompt tokens of 2",)),
    ]:
        error = refusal(one, wanted)
        assert error.kind == ErrorKind.INVALID
        assert all(word in error.detail for word in words), error.detail
    one.add(admission(1, [1]))
    assert refusal(one, admission(1, [1])).kind == ErrorKind.STALE
    assert refusal(one, admission(2, [1])).kind == ErrorKind.EXHAUSTED


def test_out_of_blocks_the_youngest_gives_back_and_every_thread_ends(tiny: Decoder) -> None:
    """A given back thread comes again with what was committed, as the kernel would send it."""
    plenty = engine(tiny, blocks=100)
    few = engine(tiny, blocks=12)
    wanted = {i: admission(i, [i, 7, 9, 11, i], output=30) for i in range(1, 6)}
    for each in wanted.values():
        plenty.add(each)
        few.add(each)
    expected = {i: tokens_of(rows) for i, rows in run(plenty).items()}
    context = {i: list(each.tokens) for i, each in wanted.items()}
    gave_back = []

    def readmit(result: StepResult) -> None:
        for row in result.rows:
            if row.token is not None:
                context[row.residency % 100].append(row.token)
        for _, residency in result.gave_back:
            gave_back.append(residency % 100)
            assert residency not in few.residencies()
            few.add(
                admission(residency + 100, context[residency % 100], prompt_tokens=5, output=30)
            )

    run(few, readmit)
    assert gave_back[0] == 5
    assert 1 not in gave_back
    assert {i: tokens[5:] for i, tokens in context.items()} == expected


def test_threads_that_share_blocks_do_not_hold_up_a_better_one_for_ever(tiny: Decoder) -> None:
    """Each of two victims frees nothing by itself, and both find their prefix again at once."""
    one = engine(tiny, blocks=12)
    prefix = list(range(30, 60))
    one.add(admission(1, [1, 2, 3], output=40))
    one.add(admission(2, prefix, output=2))
    for _ in range(8):
        for row in one.step().rows:
            one.watermark(row.residency, row.position)
    one.add(admission(3, prefix, output=9))
    one.add(admission(4, prefix, output=9))
    ended = set()
    for _ in range(300):
        result = one.step()
        one.check()
        for row in result.rows:
            one.watermark(row.residency, row.position)
            if row.end:
                ended.add(row.residency % 100)
                one.drop(row.residency)
        for _, residency in result.gave_back:
            one.add(admission(residency + 100, prefix, output=9))
    assert ended == {1, 3, 4}


def test_the_hook_hears_of_a_step_before_it_is_computed(tiny: Decoder) -> None:
    heard: list[list[tuple[bytes, int]]] = []
    one = Engine(tiny, EngineConfig(blocks=8, block_tokens=4, step_tokens=4), on_plan=heard.append)
    one.add(admission(1, [1, 2, 3, 4, 5], output=2))
    run(one)
    thread = (1).to_bytes(8, "big")
    assert heard == [[(thread, 5)], [(thread, 5)], [(thread, 6)]]


def test_prefixes_are_shared_inside_a_domain(tiny: Decoder) -> None:
    one = engine(tiny)
    prompt = list(range(1, 14))
    one.add(admission(1, prompt, domain=b"a"))
    first = tokens_of(run(one)[1])
    assert one.counters.cached_tokens == 0
    one.add(admission(2, prompt, domain=b"b"))
    assert tokens_of(run(one)[2]) == first
    assert one.counters.cached_tokens == 0
    one.add(admission(3, prompt, domain=b"a"))
    assert tokens_of(run(one)[3]) == first
    assert one.counters.cached_tokens == 12


def test_a_thread_whose_logits_are_no_numbers_fails_alone(poisoned: Decoder) -> None:
    one = engine(poisoned)
    one.add(admission(1, [1, 2, 3]))
    expected = tokens_of(run(one)[1])
    one.add(admission(2, [1, 2, 99] * 5))
    one.add(admission(3, [1, 2, 3]))
    failures = []
    rows = run(one, lambda result: failures.extend(result.failed))
    assert [(failure.residency, failure.error.kind) for failure in failures] == [
        (2, ErrorKind.INTERNAL)
    ]
    assert 2 not in one.residencies()
    assert tokens_of(rows[3]) == expected
    # Whoever gets the failed thread's blocks next finds them clean.
    for residency in range(4, 12):
        one.add(admission(residency, [1, 2, 3], domain=residency.to_bytes(1, "big")))
    rows = run(one)
    assert [tokens_of(rows[residency]) for residency in range(4, 12)] == [expected] * 8


def test_fast_and_exact_agree_where_nothing_is_close(tiny: Decoder) -> None:
    results = []
    for exact in (False, True):
        one = Engine(tiny, EngineConfig(blocks=64, block_tokens=4, step_tokens=7, exact=exact))
        for residency in range(1, 6):
            one.add(admission(residency, [residency, 9] * (3 * residency), output=12))
        results.append({residency: tokens_of(rows) for residency, rows in run(one).items()})
    assert results[0] == results[1]
