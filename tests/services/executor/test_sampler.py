import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llmproto.errors import ErrorKind, RemoteError
from llmproto.generation import Sampling
from llmservices.executor.sampler import Ask, Choice, Sampler, adjust, gumbel, keep, key, mix, score

CPU = torch.device("cpu")
GREEDY = Sampling(temperature=0.0)


def ask(sampling: Sampling, *tokens: int, prompt_tokens: int = 1) -> Ask:
    return Ask(sampling, np.asarray(tokens or (0,), dtype=np.int32), prompt_tokens)


def only(logits: list[float], request: Ask) -> int:
    (choice,) = Sampler(len(logits), CPU).choose(torch.tensor([logits]), [request])
    assert isinstance(choice, Choice)
    return choice.token


def test_greedy_ties_go_to_the_lowest_id() -> None:
    assert only([1.0, 3.0, 3.0, 2.0], ask(GREEDY)) == 1
    assert only([1.0, 3.0, 3.0, 2.0], ask(Sampling(temperature=0.0, logprobs=0))) == 1


def test_the_mixer_is_the_finaliser_in_python_integers() -> None:
    def finalise(word: int) -> int:
        word ^= word >> 16
        word = word * 0x85EBCA6B & 0xFFFFFFFF
        word ^= word >> 13
        word = word * 0xC2B2AE35 & 0xFFFFFFFF
        return word ^ word >> 16

    words = [0, 1, 2, 0x7FFFFFFF, 0x80000000, 0xDEADBEEF, 0xFFFFFFFF]
    mixed = mix(torch.tensor(words, dtype=torch.int64).to(torch.int32))
    assert [value & 0xFFFFFFFF for value in mixed.tolist()] == [finalise(word) for word in words]


def test_noise_is_fixed_for_ever() -> None:
    """A thread that is continued by a later version must go on as it began."""
    sampler = Sampler(1000, CPU)
    assert key(7, 11) == (3832027443, 540438736)
    tokens = [only([0.0] * 100, ask(Sampling(seed=seed), 1, 2, 3)) for seed in range(8)]
    assert tokens == [77, 28, 27, 18, 96, 95, 0, 76]
    assert gumbel(sampler._mixed_V, [key(0, 0)]).isfinite().all()


def test_noise_of_a_row_does_not_depend_on_the_other_rows() -> None:
    sampler = Sampler(4099, CPU)
    keys = [key(seed, 5) for seed in range(40)]
    together = gumbel(sampler._mixed_V, keys)
    for row in (0, 17, 39):
        assert torch.equal(gumbel(sampler._mixed_V, [keys[row]])[0], together[row])
    some = torch.tensor([5, 77, 4098])
    assert torch.equal(gumbel(sampler._mixed_V[some], [keys[3]])[0], together[3][some])


@pytest.mark.parametrize("by", ["position", "seed"])
def test_sampled_frequencies_follow_softmax(by: str) -> None:
    """Chi-square against the model's distribution, over positions of one seed and over seeds."""
    logits = torch.linspace(-2.0, 1.5, 16)
    draws = 20_000
    keys = [key(3, i) if by == "position" else key(i, 3) for i in range(draws)]
    noise = gumbel(Sampler(16, CPU)._mixed_V, keys)
    counts = torch.bincount((logits + noise).argmax(-1), minlength=16)
    expected = torch.softmax(logits, 0) * draws
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert chi_square < 37.7  # 15 degrees of freedom, one in a thousand


def test_neighbouring_positions_are_uncorrelated() -> None:
    sampler = Sampler(20_000, CPU)
    noise = gumbel(sampler._mixed_V, [key(1, 1), key(1, 2), key(2, 1)])
    correlation = torch.corrcoef(noise) - torch.eye(3)
    assert float(correlation.abs().max()) < 0.03
    shifted = torch.corrcoef(torch.stack([noise[0, 1:], noise[0, :-1]]))[0, 1]
    assert abs(float(shifted)) < 0.03


def test_penalties_and_bias() -> None:
    sampling = Sampling(
        repetition_penalty=2.0,
        presence_penalty=0.5,
        frequency_penalty=0.25,
        bias_tokens=[3, 9],
        bias_values=[1.0, 5.0],
    )
    adjusted = adjust(
        torch.tensor([2.0, -2.0, 4.0, 0.0]), ask(sampling, 0, 1, 2, 2, prompt_tokens=2)
    )
    assert adjusted.tolist() == [1.0, -4.0, 2.0 - 0.5 - 0.5, 1.0]


logit_lists = st.lists(
    st.floats(-20, 20, width=32).map(lambda x: round(x, 1)), min_size=1, max_size=40
)


@settings(deadline=None)
@given(logits=logit_lists, k=st.integers(1, 50))
def test_top_k_keeps_the_k_most_likely(logits: list[float], k: int) -> None:
    ids, values = keep(torch.tensor(logits), Sampling(top_k=k))
    ranked = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    assert ids.tolist() == sorted(ranked[:k])
    assert torch.equal(values, torch.tensor(logits)[ids])


@settings(deadline=None)
@given(logits=logit_lists, p=st.floats(0.01, 1.0, exclude_max=True))
def test_top_p_keeps_the_smallest_set_that_reaches_p(logits: list[float], p: float) -> None:
    chances = torch.softmax(torch.tensor(logits).double(), 0)
    ids, _ = keep(torch.tensor(logits), Sampling(top_p=p))
    kept = chances[ids]
    assert float(kept.sum()) >= p - 1e-9
    assert float(kept.sum() - kept.min()) < p + 1e-9
    left = sorted(set(range(len(logits))) - set(ids.tolist()))
    assert not left or float(chances[left].max()) <= float(kept.min())


@settings(deadline=None)
@given(logits=logit_lists, p=st.floats(0.0001, 1.0))
def test_min_p_keeps_what_is_likely_enough(logits: list[float], p: float) -> None:
    ids, _ = keep(torch.tensor(logits), Sampling(min_p=p))
    ratios = torch.exp(torch.tensor(logits).double() - max(logits))
    kept = set(ids.tolist())
    assert int(torch.tensor(logits).argmax()) in kept
    for token, ratio in enumerate(ratios.tolist()):
        if abs(ratio - p) > 1e-5:
            assert (ratio > p) == (token in kept)


@settings(deadline=None)
@given(
    rows=st.lists(
        st.tuples(
            st.sampled_from([0.0, 0.5, 1.0, 3.0]),
            st.sampled_from([0, 3]),
            st.sampled_from([0.5, 1.0]),
            st.sampled_from([None, 2]),
            st.integers(0, 3),
        ),
        min_size=1,
        max_size=6,
    ),
    salt=st.integers(0, 1000),
)
def test_a_choice_does_not_depend_on_the_batch(
    rows: list[tuple[float, int, float, int | None, int]], salt: int
) -> None:
    sampler = Sampler(50, CPU)
    logits = torch.randn(len(rows), 50, generator=torch.Generator().manual_seed(salt))
    asks = [
        ask(Sampling(temperature=t, top_k=k, top_p=p, logprobs=n, seed=seed), 1, 2)
        for t, k, p, n, seed in rows
    ]
    together = sampler.choose(logits, asks)
    assert together == [
        sampler.choose(logits[row : row + 1], asks[row : row + 1])[0] for row in range(len(rows))
    ]


def test_scores_are_of_temperature_one_and_ranked() -> None:
    result = score(torch.tensor([0.0, 2.0, 1.0]), 0, 2)
    total = 1 + math.exp(2) + math.exp(1)
    assert result.token == 0
    assert result.logprob == pytest.approx(-math.log(total))
    assert result.top_tokens == [1, 2]
    assert result.top_logprobs == pytest.approx([2 - math.log(total), 1 - math.log(total)])


def test_a_row_that_is_not_a_number_fails_alone() -> None:
    nan, infinite = float("nan"), float("inf")
    logits = torch.tensor([[0.0, nan], [0.0, 1.0], [infinite, 0.0], [-infinite, -infinite]])
    choices = Sampler(2, CPU).choose(logits, [ask(GREEDY)] * 4)
    assert choices[1] == Choice(1, None)
    for row in (0, 2, 3):
        failure = choices[row]
        assert isinstance(failure, RemoteError)
        assert failure.kind == ErrorKind.INTERNAL


def test_noise_is_never_infinite() -> None:
    """Where the hashed word is below 64 of 2^32: about once in 400 tokens of a large vocabulary."""
    mixed = Sampler(151_936, CPU)._mixed_V
    noise = [
        float(gumbel(mixed[token : token + 1], [key(7, i)]))
        for i, token in ((277, 146_261), (298, 52_073))
    ]
    assert noise == pytest.approx([-math.log(35.5 / 2**32), -math.log(41.5 / 2**32)], rel=1e-6)
