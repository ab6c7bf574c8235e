"""Rows whose text is decided, and the rows around them."""

import itertools

import pytest
import torch

from dream_lightning.sampling.rows import has_ended

MASK = 57
CACHES = [{}, {"block_length": 8}, {"block_length": 8, "cache": "prefix"}, {"block_length": 8, "cache": "dual"}]
WAYS = [{"steps": 12}, {"threshold": 0.4}, {"tokens_per_step": 2, "temperature": 1.0}, {"alg": "origin", "steps": 12}]


def test_ended_by_hand():
    new = torch.tensor(
        [[1, 9, 0, 0], [0, 9, 9, 9], [1, 2, 3, 4], [9, 0, 0, 2], [1, 2, 9, 9], [1, 2, 0, 9], [1, 2, 3, 9]]
    )
    assert has_ended(new, 0, 9).tolist() == [True, False, False, True, True, False, True]


@pytest.fixture(params=["deep", "shallow"])
def talker(request, prompts, run, monkeypatch):
    """A model whose eos is the token that it predicts most."""
    model = request.getfixturevalue(request.param)
    common = run(model, prompts(16)).sequences[:, 7:].flatten().mode().values
    monkeypatch.setattr(model.config, "eos_token_id", int(common))
    return model


def texts(out, eos):
    """New tokens of every row up to its first eos."""
    rows = [row[7:].tolist() for row in out.sequences]
    return [row[: row.index(eos)] if eos in row else row for row in rows]


@pytest.mark.parametrize("cache", CACHES, ids=str)
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_the_text_is_as_without_stopping(talker, prompts, run, way, cache):
    eos, ids = talker.config.eos_token_id, prompts(11)
    long, short = run(talker, ids, **way, **cache), run(talker, ids, stop_at_eos=True, **way, **cache)
    assert texts(short, eos) == texts(long, eos)
    assert (short.forwards <= long.forwards).all() and (short.forwards < long.forwards).any()
    assert (short.sequences != MASK).all()
    # What was not predicted is eos, behind the first eos.
    skipped = (short.filled_at == -1)[:, 7:]
    assert skipped.any() and (short.sequences[:, 7:][skipped] == eos).all()
    assert (short.confidence[:, 7:][skipped] == 0).all()


def test_ended_rows_leave_the_batch(talker, prompts, run, calls):
    seen = calls(talker)
    run(talker, prompts(11), stop_at_eos=True, block_length=8)
    rows = [shape[0] for shape in seen]
    assert rows == sorted(rows, reverse=True) and set(rows) <= {11, 8, 4, 2, 1} and len(set(rows)) > 2


def test_with_a_cache_they_leave_at_a_block(talker, prompts, run, calls):
    seen = calls(talker)
    run(talker, prompts(11), stop_at_eos=True, block_length=8, cache="dual")
    for before, after in itertools.pairwise(seen):
        assert after[0] == before[0] or after == [after[0], 31]


def test_ranks_stay_in_step(talker, prompts, run, calls):
    seen = calls(talker)
    a = run(talker, prompts(5), stop_at_eos=True, block_length=8, cache="dual", run_every_step=True)
    assert len(seen) == 24
    assert torch.equal(a.history, run(talker, prompts(5), stop_at_eos=True, block_length=8, cache="dual").history)
