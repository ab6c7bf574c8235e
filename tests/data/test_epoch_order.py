"""The order of an epoch: the same samples a step on any number of ranks, and resumable."""

import warnings

import pytest
import torch

from dream_lightning.data.epoch_order import ResumableLoader, RowSampler, bucket_by_length
from dream_lightning.diffusion import stratified_t

ROWS = [[0, 1], [2], [3], [4, 5, 6], [7], [8], [9]]


def keys(rank=0, world_size=1, batch_size=1, epoch=0, rows=ROWS, **options):
    sampler = RowSampler(rows, batch_size=batch_size, rank=rank, world_size=world_size, **options)
    sampler.set_epoch(epoch)
    assert len(list(sampler)) == len(sampler)
    return list(sampler)


def test_every_document_once_an_epoch_in_a_new_order():
    epochs = [keys(epoch=epoch) for epoch in range(3)]
    for epoch, rows in enumerate(epochs):
        assert sorted(d.index for row in rows for d in row) == list(range(10))
        assert sorted(d.order for row in rows for d in row) == list(range(10))
        assert {d.epoch for row in rows for d in row} == {epoch}
    assert len({tuple(row[0].index for row in rows) for rows in epochs}) == 3
    assert keys(epoch=1) == epochs[1]
    assert keys(epoch=1, seed=5) != epochs[1]


@pytest.mark.parametrize(("world_size", "batch_size"), [(2, 1), (3, 1), (2, 2), (4, 2), (5, 1)])
def test_ranks_share_every_step_and_make_the_same_number_of_batches(world_size, batch_size):
    whole = keys()
    ranks = [keys(rank, world_size, batch_size) for rank in range(world_size)]
    assert len({len(rows) for rows in ranks}) == 1
    counted = [row for rows in ranks for row in rows if row[0].counted]
    assert sorted(counted, key=whole.index) == whole
    step = world_size * batch_size
    for start in range(0, len(whole) - step + 1, step):  # a full step has the same rows on any ranks
        i = start // world_size
        taken = [row for rows in ranks for row in rows[i : i + batch_size]]
        assert sorted(taken, key=whole.index) == whole[start : start + step]


def test_single_documents_are_in_order_and_packing_does_not_change_it():
    unpacked = keys(rows=[[i] for i in range(10)])
    assert [row[0].order for row in unpacked] == list(range(10))
    assert {d.index: d.order for row in keys() for d in row} == {d.index: d.order for (d,) in unpacked}


def test_consecutive_packed_rows_have_evenly_spread_t():
    """Of any 8 rows the first, longest documents leave gaps in t like those of single documents."""
    rows = [[3 * i, 3 * i + 1, 3 * i + 2] for i in range(300)]
    for epoch in range(3):
        first = torch.tensor([row[0].order for row in keys(rows=rows, epoch=epoch)])
        t = stratified_t(0, torch.full_like(first, epoch), first)
        circle = torch.stack([t[start : start + 8].sort().values for start in range(len(t) - 8)])
        gaps = torch.diff(torch.cat([circle, circle[:, :1] + 1], dim=1), dim=1).max(dim=1).values
        assert gaps.max() < 0.4 and gaps.mean() < 0.25  # independent t: 0.8 and 0.34


def test_short_documents_first_is_a_curriculum_of_documents_in_any_packing():
    lengths = [10 - n // 2 for n in range(10)]
    epochs = [keys(rows=[[i] for i in range(10)], lengths=lengths, epoch=epoch) for epoch in range(2)]
    assert all([lengths[row[0].index] for row in rows] == sorted(lengths) for rows in epochs)
    assert epochs[0] != epochs[1]  # equal lengths are shuffled
    assert [row[0].order for row in epochs[0]] == list(range(10))
    packed = keys(lengths=lengths)
    assert {d.index: d.order for row in packed for d in row} == {d.index: d.order for (d,) in epochs[0]}
    assert [row[0].order for row in packed] == sorted(row[0].order for row in packed)


def test_validation_keys_are_fixed_and_spread():
    once, twice = keys(shuffle=False), keys(shuffle=False, repeats=2, epoch=3)
    assert [d.index for row in once for d in row] == list(range(10))
    assert len(twice) == 14 and len({d.order for row in twice for d in row}) == 20
    assert {d.epoch for row in twice for d in row} == {-1, -2}
    assert twice == keys(shuffle=False, repeats=2, epoch=8)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_draws_of_a_validation_document_have_evenly_spread_t(seed):
    rows = keys(rows=[[i] for i in range(10)], shuffle=False, repeats=8)
    epochs, document_ids = (torch.tensor([getattr(row[0], name) for row in rows]) for name in ("epoch", "order"))
    circle = stratified_t(seed, epochs, document_ids).view(10, 8).sort(dim=1).values
    gaps = torch.diff(torch.cat([circle, circle[:, :1] + 1], dim=1), dim=1)
    assert gaps.max() < 2 / 8


class Indices(torch.utils.data.Dataset):
    """The document numbers that a sampler yields."""

    def __getitem__(self, row):
        return row[0].index


def loader(workers, batch_size=4, **options):
    sampler = RowSampler([[i] for i in range(23)], batch_size=batch_size, **options)
    return ResumableLoader(Indices(), sampler=sampler, batch_size=batch_size, num_workers=workers, collate_fn=list)


def read(source, epoch, count=None):
    source.sampler.set_epoch(epoch)
    return [batch for batch, _ in zip(source, range(count or len(source)), strict=False)]


@pytest.mark.parametrize(("workers", "options"), [(0, {}), (2, {}), (0, {"lengths": [n % 5 for n in range(23)]})])
def test_a_loader_resumes_where_it_was_saved(workers, options):
    whole, stopped, resumed = (loader(workers, **options) for _ in range(3))
    epochs = [read(whole, epoch) for epoch in range(2)]
    iterator = iter(stopped)
    assert [next(iterator) for _ in range(3)] == epochs[0][:3]
    resumed.load_state_dict(stopped.state_dict())
    assert list(resumed) == epochs[0][3:]
    assert read(resumed, 1) == epochs[1]
    assert len(resumed) == 6


def test_resuming_in_another_order_warns():
    stopped = loader(0)
    read(stopped, 0, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for options in ({}, {"batch_size": 2}, {"world_size": 2}):
            loader(0, **options).load_state_dict(stopped.state_dict())
        loader(0, seed=5).load_state_dict({"epoch": 1, "rows": 0, "rows_per_epoch": 23, "seed": 0})
    with pytest.warns(UserWarning, match=r"has 23 rows \(data.seed 0\), this run.s 23 \(data.seed 5\)"):
        loader(0, seed=5).load_state_dict(stopped.state_dict())


def test_bucketing_sorts_windows_by_length_and_keeps_the_order_of_equal_lengths():
    length = {0: 1, 2: 4, 3: 4, 5: 9, 7: 2, 8: 3}.get
    assert bucket_by_length([0, 2, 3, 5, 7, 8], length, window=4) == [5, 2, 3, 0, 8, 7]
    assert bucket_by_length(range(3), int, window=1) == [0, 1, 2]
