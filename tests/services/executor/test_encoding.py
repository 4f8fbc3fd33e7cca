"""The engine of encoders: what a step chooses, what leaves it, and that neighbours change nothing
in exact mode."""

from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from llmproto.errors import ErrorKind, RemoteError
from llmservices.executor import encoding
from llmservices.executor.contract import Admission, Computed, EngineConfig
from llmservices.executor.encoding import Chosen, EncoderEngine, Waiting, choose, cut
from llmservices.executor.service import messages_of
from llmservices.models.encoder import Encoder, EncoderModel
from llmservices.models.foreign import ForeignEncoder
from llmservices.models.loading import load

from ..encoders import make


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> EncoderModel:
    folder, _ = make(tmp_path_factory.mktemp("encoder"))
    found = load(folder, device=torch.device("cpu"))
    assert isinstance(found, Encoder | ForeignEncoder)
    return found


def engine(
    model: EncoderModel, *, exact: bool = False, step_tokens: int = 64, workers: int = 1
) -> EncoderEngine:
    config = EngineConfig(blocks=9, residents_max=4, step_tokens=step_tokens, exact=exact)
    return EncoderEngine(model, config, workers=workers)


def call(residency: int, *lengths: int, service_class: int = 1, priority: int = 0) -> Admission:
    chance = np.random.default_rng(residency)
    tokens = chance.integers(4, 40, sum(lengths)).tolist()
    return Admission(
        thread=residency.to_bytes(8),
        residency=residency,
        tokens=tokens,
        prompt_tokens=len(tokens),
        output_tokens_max=0,
        lengths=lengths,
        service_class=service_class,
        priority=priority,
    )


def run(engine: EncoderEngine) -> dict[int, bytes]:
    found: dict[int, bytes] = {}
    while engine.runnable():
        result = engine.step()
        engine.check()
        assert not result.failed
        found.update({each.residency: each.vectors for each in result.vectors})
    return found


# --- choosing ---------------------------------------------------------------------------------


def waiting(residency: int, *lengths: int, rank: int = 0, done: int = 0) -> Waiting:
    return Waiting(residency, (rank, 0, residency), lengths, done)


def test_inputs_of_equal_length_stand_together() -> None:
    chosen = choose([waiting(1, 3, 2), waiting(2, 2, 3)], step_tokens=64)
    assert chosen == [Chosen(1, 1, 2), Chosen(2, 0, 2), Chosen(1, 0, 3), Chosen(2, 1, 3)]


def test_the_better_rank_goes_first_and_a_long_call_goes_on_later() -> None:
    calls = [waiting(1, 5, 5, 5, rank=1), waiting(2, 4, 4, rank=0)]
    assert choose(calls, step_tokens=13) == [Chosen(2, 0, 4), Chosen(2, 1, 4), Chosen(1, 0, 5)]
    assert choose([waiting(1, 5, 5, 5, done=1)], step_tokens=7) == [Chosen(1, 1, 5)]


def test_one_input_is_taken_however_long() -> None:
    assert choose([waiting(1, 50, 2)], step_tokens=8) == [Chosen(1, 0, 50)]


@given(
    st.lists(st.tuples(st.integers(0, 3), st.lists(st.integers(1, 30), min_size=1)), max_size=6),
    st.integers(1, 60),
)
def test_choices_are_bounded_in_order_and_whole(
    calls: list[tuple[int, list[int]]], step_tokens: int
) -> None:
    rows = [waiting(number, *lengths, rank=rank) for number, (rank, lengths) in enumerate(calls)]
    chosen = choose(rows, step_tokens=step_tokens)
    assert len(chosen) <= 1 or sum(one.tokens for one in chosen) <= step_tokens
    assert bool(chosen) == bool(calls)
    assert [one.tokens for one in chosen] == sorted(one.tokens for one in chosen)
    for row in rows:
        taken = sorted(one.input for one in chosen if one.residency == row.residency)
        assert taken == list(range(len(taken)))


def test_pieces_are_of_about_equal_size_and_in_order() -> None:
    chosen = [Chosen(1, number, tokens) for number, tokens in enumerate((2, 3, 3, 4, 30))]
    assert [[one.tokens for one in piece] for piece in cut(chosen, piece_tokens=6)] == [
        [2, 3],
        [3],
        [4],
        [30],
    ]
    assert cut([], piece_tokens=6) == []


# --- computing --------------------------------------------------------------------------------


def test_calls_are_complete_when_all_their_inputs_are(model: EncoderModel) -> None:
    at_work = engine(model, step_tokens=10)
    at_work.add(call(1, 6, 6))
    at_work.add(call(2, 3))
    first = at_work.step()
    assert [each.residency for each in first.vectors] == []
    rest = run(at_work)
    assert sorted(rest) == [1, 2]
    assert len(rest[1]) == 2 * 24 * 4
    assert at_work.computed(1) == [Computed((1).to_bytes(8), 1, 24, rest[1])]
    at_work.drop(1)
    assert at_work.computed(1) == []
    assert at_work.residencies() == [2]


def test_a_step_does_what_it_can_for_the_most_urgent(model: EncoderModel) -> None:
    at_work = engine(model, step_tokens=6)
    at_work.add(call(1, 6, service_class=2))
    at_work.add(call(2, 6, service_class=1))
    at_work.add(call(3, 6, service_class=1, priority=3))
    order = []
    while at_work.runnable():
        order += [each.residency for each in at_work.step().vectors]
    assert order == [3, 2, 1]


def test_the_hook_hears_of_each_step_before_it_is_computed(model: EncoderModel) -> None:
    noted: list[list[tuple[bytes, int]]] = []
    config = EngineConfig(blocks=9, residents_max=4, step_tokens=6)
    at_work = EncoderEngine(model, config, on_plan=noted.append)
    at_work.add(call(1, 6, 6))
    run(at_work)
    assert noted == [[((1).to_bytes(8), 0)], [((1).to_bytes(8), 1)]]


def test_in_exact_mode_neighbours_change_no_bit(model: EncoderModel) -> None:
    alone = engine(model, exact=True)
    alone.add(call(1, 5, 9, 30))
    wanted = run(alone)[1]
    beside = engine(model, exact=True, step_tokens=40, workers=2)
    for other in (call(2, 5, 5), call(1, 5, 9, 30), call(3, 30, 9, 17)):
        beside.add(other)
    assert run(beside)[1] == wanted


def test_in_fast_mode_neighbours_change_next_to_nothing(model: EncoderModel) -> None:
    alone = engine(model)
    alone.add(call(1, 5, 9, 30))
    beside = engine(model)
    for other in (call(2, 5, 5), call(1, 5, 9, 30), call(3, 30, 9, 17)):
        beside.add(other)
    one, two = (np.frombuffer(run(each)[1], "<f4") for each in (alone, beside))
    np.testing.assert_allclose(one, two, rtol=0, atol=1e-5)


def test_workers_share_a_step(model: EncoderModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "PIECE_TOKENS", 8)
    alone, shared = engine(model), engine(model, workers=2)
    for at_work in (alone, shared):
        at_work.add(call(1, 5, 9, 30, 3, 3))
    one, two = (np.frombuffer(run(each)[1], "<f4") for each in (alone, shared))
    np.testing.assert_allclose(one, two, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("admission", "kind", "says"),
    [
        (call(1, 35), ErrorKind.INVALID, "an input has 35 tokens; the model takes 34"),
        (call(1), ErrorKind.INVALID, "inputs of 0 tokens together"),
        (
            Admission(
                thread=bytes(8),
                residency=1,
                tokens=[7, 44],
                prompt_tokens=2,
                output_tokens_max=0,
                lengths=[2],
            ),
            ErrorKind.INVALID,
            "token id 44; the model's vocabulary ends at 43",
        ),
    ],
)
def test_what_can_never_be_computed_is_refused(
    model: EncoderModel, admission: Admission, kind: ErrorKind, says: str
) -> None:
    with pytest.raises(RemoteError) as caught:
        engine(model).add(admission)
    assert caught.value.kind is kind
    assert says in caught.value.detail


def test_a_full_table_and_a_repeated_residency(model: EncoderModel) -> None:
    at_work = engine(model)
    for residency in range(1, 5):
        at_work.add(call(residency, 2))
    for residency, kind in ((4, ErrorKind.STALE), (5, ErrorKind.EXHAUSTED)):
        with pytest.raises(RemoteError) as caught:
            at_work.add(call(residency, 2))
        assert caught.value.kind is kind


def test_numbers_that_are_none_end_their_call_alone(tmp_path: Path) -> None:
    folder, _ = make(tmp_path)
    broken = load(folder, device=torch.device("cpu"))
    assert isinstance(broken, Encoder)
    with torch.inference_mode():
        broken._embeddings.tokens_VC[4] = float("nan")
    at_work = engine(broken)
    good, bad = call(1, 3), call(2, 3, 3)
    at_work.add(msgspec.structs.replace(good, tokens=[5, 6, 7]))
    at_work.add(msgspec.structs.replace(bad, tokens=[5, 6, 7, 5, 4, 7]))
    result = at_work.step()
    assert [each.residency for each in result.vectors] == [1]
    (failure,) = result.failed
    assert (failure.residency, failure.error.kind) == (2, ErrorKind.INTERNAL)
    assert "input 1" in failure.error.detail
    assert at_work.residencies() == [1]


# --- messages ---------------------------------------------------------------------------------


def test_messages_of_vectors_are_never_too_large() -> None:
    computed = [Computed(n.to_bytes(8), n, 4, bytes(200_000)) for n in range(1, 7)]
    sent = list(messages_of(computed))
    assert [len(vectors.threads) for vectors, _ in sent] == [2, 2, 2]
    assert all(len(blob) == sum(vectors.sizes) for vectors, blob in sent)
    assert [vectors.offsets for vectors, _ in sent] == [[0, 200_000]] * 3
    assert list(messages_of([])) == []
