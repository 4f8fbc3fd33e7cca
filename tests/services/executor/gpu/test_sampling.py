"""Sampling on the device chooses what the other sampler chooses."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llmproto.errors import ErrorKind, RemoteError
from llmproto.generation import Sampling
from llmservices.executor.gpu.sampling import DeviceSampler, samples
from llmservices.executor.sampler import Ask, Choice, Sampler

CPU, VOCAB = torch.device("cpu"), 97
DEVICE, HOST = DeviceSampler(VOCAB, CPU), Sampler(VOCAB, CPU)
SAMPLINGS = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.5, 1.0, 1.7]),
    top_k=st.sampled_from([0, 1, 3, 20, 96, 200]),
    top_p=st.sampled_from([1.0, 0.95, 0.5, 0.01]),
    min_p=st.sampled_from([0.0, 0.05, 1.0]),
    seed=st.integers(0, 2**40),
)


@settings(deadline=None, max_examples=150)
@given(
    st.lists(st.tuples(SAMPLINGS, st.integers(1, 9)), min_size=1, max_size=6),
    st.integers(0, 1000),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_any_rows(rows: list[tuple[Sampling, int]], seed: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(len(rows), VOCAB, generator=generator) * 3).to(dtype)
    # Equal logits, too.
    logits[:, 5:9] = logits[:, 4:5]
    asks = [Ask(sampling, np.zeros(tokens, dtype=np.int32), 1) for sampling, tokens in rows]
    drawn = DEVICE.draw(logits, asks)
    expected = HOST.choose(logits, asks)
    assert drawn.take() == expected
    assert drawn.tokens_W.tolist() == [
        choice.token for choice in expected if isinstance(choice, Choice)
    ]


def test_a_row_that_is_no_number_fails_alone() -> None:
    logits = torch.zeros(2, VOCAB)
    logits[0, 3] = float("nan")
    ask = Ask(Sampling(temperature=0.0), np.zeros(4, dtype=np.int32), 1)
    first, second = DEVICE.draw(logits, [ask, ask]).take()
    assert isinstance(first, RemoteError)
    assert first.kind is ErrorKind.INTERNAL
    assert second == Choice(0, None)


def test_what_needs_the_ids_or_gives_scores_is_left_to_the_other() -> None:
    assert samples(Sampling(top_k=3, top_p=0.5, min_p=0.1))
    for other in (
        Sampling(logprobs=0),
        Sampling(repetition_penalty=1.1),
        Sampling(frequency_penalty=0.1),
        Sampling(bias_tokens=[1], bias_values=[1.0]),
    ):
        assert not samples(other)
