"""Orders: PyTorch's own, each row once, and accelerate's epochs."""

import accelerate
import numpy as np
import pytest
import torch
from accelerate.utils import DataLoaderConfiguration
from hypothesis import given, settings
from hypothesis import strategies as st
from llmproto.errors import RemoteError
from llmservices.data import order


@pytest.mark.parametrize("rows", [0, 1, 2, 7, 1000, 6920, 70_000])
@pytest.mark.parametrize("seed", [0, 1, 42, (1 << 32) + 5, (1 << 53) - 1])
def test_a_permutation_is_that_of_torch(rows: int, seed: int) -> None:
    wanted = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    assert order.permutation(rows, seed).tolist() == wanted.tolist()


def test_epochs_come_in_the_order_of_the_reference_loader() -> None:
    """What transformers.Trainer iterates: a DataLoader with RandomSampler, prepared."""
    torch.manual_seed(7)
    config = DataLoaderConfiguration(use_seedable_sampler=True)
    accelerator = accelerate.Accelerator(cpu=True, dataloader_config=config)
    rows = torch.utils.data.TensorDataset(torch.arange(37))
    sampler = torch.utils.data.RandomSampler(rows)
    loader = accelerator.prepare(torch.utils.data.DataLoader(rows, batch_size=4, sampler=sampler))
    for epoch in range(3):
        loader.set_epoch(epoch)
        seen = [row for (batch,) in loader for row in batch.tolist()]
        assert order.shuffled(37, 7, epoch).tolist() == seen


def test_more_rows_than_32_bit_draws_cover_are_refused() -> None:
    with pytest.raises(RemoteError, match=f"{order.ROWS_MAX} rows cannot be shuffled"):
        order.permutation(order.ROWS_MAX, 0)


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=300),
    batch=st.integers(1, 9),
    seed=st.integers(0, 1 << 40),
)
def test_grouping_keeps_every_row_once(lengths: list[int], batch: int, seed: int) -> None:
    rows = order.shuffled(len(lengths), seed, 0)
    grouped = order.grouped_by_length(rows, np.array(lengths), batch=batch, seed=seed)
    assert sorted(grouped.tolist()) == list(range(len(lengths)))


def test_grouping_makes_batches_of_like_lengths() -> None:
    lengths = np.random.RandomState(0).randint(1, 512, 4000)
    rows = order.shuffled(4000, 3, 0)
    grouped = order.grouped_by_length(rows, lengths, batch=16, seed=3)
    padded = sum(int(lengths[batch].max()) * 16 for batch in grouped.reshape(-1, 16))
    assert padded < 1.05 * lengths.sum()


@settings(max_examples=30, deadline=None)
@given(places=st.integers(1, 1 << 40), seed=st.integers(0, 1 << 53), index=st.integers(0, 1 << 40))
def test_windows_begin_inside_and_the_same_each_time(places: int, seed: int, index: int) -> None:
    starts = order.window_starts(8, places, seed=seed, index=index)
    assert ((starts >= 0) & (starts < places)).all()
    assert starts.tolist() == order.window_starts(8, places, seed=seed, index=index).tolist()
