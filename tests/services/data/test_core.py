"""Batches as a pure function: the same twice, each row once, nothing lost on the way."""

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llmproto.errors import RemoteError
from llmservices.data import packing
from llmservices.data.core import Arrangement, Plan, Rows
from llmservices.data.dataset import Dataset, Meta, write_rows
from llmservices.data.order import permutation
from llmservices.data.packing import offsets_of
from llmservices.texts.segments import NOTHING

META = Meta("", 0, 0, 0, "text", {}, {}, [], ends=False)
LENGTHS = st.lists(st.integers(1, 16), min_size=1, max_size=60)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("rows")


def dataset(folder: Path, lengths: list[int], learn: list[int] | None = None) -> Dataset:
    """Documents whose tokens are 0, 1, 2, ... throughout, so that each is known by its ids."""
    count = sum(lengths)
    (folder / "ids").write_bytes(np.arange(count, dtype=np.int32).tobytes())
    if learn is not None:
        (folder / "learn").write_bytes(np.array(learn, np.uint8).tobytes())
    write_rows(
        folder / "rows.arrow",
        ids=folder / "ids",
        lengths=np.array(lengths),
        learn=None if learn is None else folder / "learn",
        types=None,
        labels=None,
        values=None,
    )
    return Dataset(folder, META)


def plan(data: Dataset, **fields: Any) -> Plan:  # Any: fields of several types
    given = {"context_tokens": 16, "batch": 3, "seed": 5, "shuffle": True, **fields}
    return Plan(data, Arrangement(dataset="d", task="generate", **given))


def epoch(made: Plan, number: int = 0) -> list[list[int]]:
    """The rows of one epoch as lists of ids."""
    rows: list[list[int]] = []
    first = number * made.batches
    taken: dict[int, tuple[Rows, list[int]]] = {}
    for batch in range(first, first + made.batches):
        segment, place = divmod(batch, made.segment_batches)
        found, counts = taken.get(segment) or taken.setdefault(segment, made.segment(segment))
        begins = offsets_of(found.lengths)
        start = sum(counts[:place])
        rows += [
            found.ids[begins[row] : begins[row + 1]].tolist()
            for row in range(start, start + counts[place])
        ]
    return rows


def equal(one: Rows, other: Rows) -> bool:
    return all(
        (mine is None and theirs is None)
        or (mine is not None and theirs is not None and np.array_equal(mine, theirs))
        for mine, theirs in zip(one, other, strict=True)
    )


@settings(max_examples=30, deadline=None)
@given(lengths=LENGTHS, batch=st.integers(1, 7), seed=st.integers(0, 1 << 52), data=st.data())
def test_a_plan_is_the_same_twice_and_each_epoch_has_each_row_once(
    folder: Path, lengths: list[int], batch: int, seed: int, data: st.DataObject
) -> None:
    rows = dataset(folder, lengths)
    fields = {
        "batch": batch,
        "seed": seed,
        "packing": data.draw(st.sampled_from(["none", "isolated", "joined"])),
        "shuffle": data.draw(st.booleans()),
    }
    fields["group_by_length"] = fields["packing"] != "joined" and data.draw(st.booleans())
    one, other = plan(rows, **fields), plan(rows, **fields)
    index = data.draw(st.integers(0, 3))
    other.segment(1 + index)  # what was asked before is of no matter
    assert equal(one.segment(index)[0], other.segment(index)[0])
    for number in (0, 2):
        seen = epoch(one, number)
        assert len(seen) == one.rows
        assert Counter(token for row in seen for token in row) == Counter(range(sum(lengths)))


@settings(max_examples=30, deadline=None)
@given(lengths=LENGTHS, ranks=st.integers(1, 5))
def test_ranks_partition_every_batch(folder: Path, lengths: list[int], ranks: int) -> None:
    made = plan(dataset(folder, lengths), batch=4)
    for index in range(made.batches):
        rows = made.batch_rows(index).tolist()
        shares = [rows[rank::ranks] for rank in range(ranks)]
        assert sorted(row for share in shares for row in share) == sorted(rows)


@settings(max_examples=30, deadline=None)
@given(lengths=LENGTHS)
def test_isolated_packing_never_loses_repeats_or_cuts(folder: Path, lengths: list[int]) -> None:
    documents, offsets = packing.isolated(np.array(lengths), 16)
    assert sorted(documents.tolist()) == list(range(len(lengths)))
    rows = [documents[start:stop] for start, stop in itertools.pairwise(offsets.tolist())]
    assert all(0 < sum(lengths[document] for document in row) <= 16 for row in rows)
    made = plan(dataset(folder, lengths), packing="isolated", shuffle=False)
    found, _ = made.segment(0)
    begins = offsets_of(found.documents)
    whole = offsets_of(np.array(lengths))
    for place, length in enumerate(found.documents.tolist()):
        ids = found.ids[begins[place] : begins[place] + length]
        document = int(np.searchsorted(whole, ids[0]))
        assert ids.tolist() == list(range(whole[document], whole[document + 1]))
        labels = found.labels[begins[place] : begins[place] + length].tolist()
        assert labels == [*ids[1:].tolist(), NOTHING]  # nothing of a neighbour is learned


def test_isolated_packing_fills_rows() -> None:
    lengths = np.random.RandomState(0).randint(1, 512, 5000)
    _, offsets = packing.isolated(lengths, 512)
    assert lengths.sum() / ((len(offsets) - 1) * 512) > 0.97


def test_joined_rows_are_the_documents_one_after_another(folder: Path) -> None:
    made = plan(dataset(folder, [5, 30, 2]), packing="joined", shuffle=False, context_tokens=8)
    assert epoch(made) == [list(range(start, min(37, start + 8))) for start in range(0, 37, 8)]
    found, _ = made.segment(0)
    assert found.labels[:36].tolist() == list(range(1, 37))
    assert found.labels[36] == NOTHING


@settings(max_examples=30, deadline=None)
@given(lengths=st.lists(st.integers(0, 9), min_size=8, max_size=40), seed=st.integers(0, 99))
def test_shuffled_joined_rows_part_neighbours(folder: Path, lengths: list[int], seed: int) -> None:
    """The stream is the documents, each whole, in an order of the seed's; labels follow it, too."""
    lengths[0], lengths[-1] = 3, 2
    data = dataset(folder, lengths)
    made = plan(data, packing="joined", seed=seed, context_tokens=8)
    batches = range(made.batches)
    found = [made.segment(batch // made.segment_batches) for batch in batches]
    after: dict[int, int] = {}
    for rows, _ in found:
        after.update(zip(rows.ids.tolist(), rows.labels.tolist()))
    (last,) = [token for token, label in after.items() if label == NOTHING]
    begins = offsets_of(np.array(lengths))
    for begin, end in itertools.pairwise(begins.tolist()):
        assert all(after[token] == token + 1 for token in range(begin, end - 1))
    documents = permutation(len(lengths), seed)
    wanted = [token for at in documents for token in range(begins[at], begins[at + 1])]
    assert last == wanted[-1]
    assert all(after[one] == other for one, other in itertools.pairwise(wanted))


def test_a_piece_of_a_split_text_learns_the_first_token_of_the_next(folder: Path) -> None:
    made = plan(dataset(folder, [3, 2], learn=[1, 1, 1, 1, 0]), shuffle=False)
    found, _ = made.segment(0)
    assert found.labels[:5].tolist() == [1, 2, 3, 4, NOTHING]


def test_unshuffled_windows_predict_every_token_once(folder: Path) -> None:
    made = plan(dataset(folder, [50]), sampling="windows", shuffle=False, context_tokens=8)
    found, counts = made.segment(0)
    rows = counts[0] * made.batches
    assert made.tokens == 49
    assert sorted(found.labels[: made.tokens].tolist()) == list(range(1, 50))
    assert rows >= made.rows == 7


def test_a_text_shorter_than_a_window_is_refused_with_both_numbers(folder: Path) -> None:
    with pytest.raises(RemoteError, match="has 16 tokens, a window needs 17"):
        plan(dataset(folder, [16]), sampling="windows")


def test_grouping_makes_batches_of_like_lengths_and_keeps_the_small_one_last(folder: Path) -> None:
    lengths = [1 + row % 16 for row in range(100)]
    made = plan(dataset(folder, lengths), group_by_length=True, batch=8)
    rows = epoch(made)
    batches = [rows[start : start + 8] for start in range(0, 96, 8)]
    assert sum(max(map(len, batch)) - min(map(len, batch)) for batch in batches) < 16
    assert len(made.batch_rows(made.batches - 1)) == 4
