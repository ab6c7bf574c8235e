"""What the caller demands of the tokens."""

import pytest
import torch

MASK = 57
RULES = [{"steps": 12}, {"threshold": 0.4}, {"block_length": 8, "cache": "dual", "steps": 12}]


def new(out):
    return out.sequences[:, 7:]


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_banned_tokens(deep, prompts, run, rule):
    free = new(run(deep, prompts(6), **rule))
    banned = free.flatten().unique()[:10].tolist()
    kept = new(run(deep, prompts(6), banned_tokens=banned, **rule))
    assert not torch.isin(kept, torch.tensor(banned)).any()
    assert torch.equal(new(run(deep, prompts(6), banned_tokens=[], **rule)), free)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_no_eos_before_the_minimum_length(deep, prompts, run, rule, monkeypatch):
    eos = int(new(run(deep, prompts(6), **rule)).flatten().mode().values)
    monkeypatch.setattr(deep.config, "eos_token_id", eos)
    late = new(run(deep, prompts(6), min_new_tokens=10, **rule))
    assert not (late[:, :10] == eos).any() and (late[:, 10:] == eos).any()


def test_the_minimum_length_holds_in_the_gaps_of_a_prompt(deep, prompts, run, monkeypatch):
    ids = prompts(8)
    ids[:, 3:5] = MASK
    free = run(deep, ids, infill=True)
    monkeypatch.setattr(deep.config, "eos_token_id", int(free.sequences[:, 3:5].flatten().mode().values))
    later = run(deep, ids, infill=True, min_new_tokens=20).sequences
    assert not (later[:, 3:27] == deep.config.eos_token_id).any()


@pytest.mark.parametrize("rule", [{"steps": 12}, {"block_length": 8, "cache": "dual"}, {"tokens_per_step": 3}], ids=str)
def test_logits_hook(deep, prompts, run, rule):
    seen = set()

    def only_even(step, x, logits, row, column):
        assert logits.dtype == torch.float32 and logits.shape == (len(row), 60)
        assert (x[row, column] == MASK).all()
        seen.add(step)
        logits[:, 1::2] = -torch.inf
        return logits

    out = run(deep, prompts(3), logits_hook=only_even, **rule)
    assert (new(out) % 2 == 0).all()
    assert seen == set(out.filled_at.unique().tolist()) - {-1}
    with pytest.raises(ValueError, match=r"logits_hook returned NoneType, wanted torch.float32 \[72, 60\]"):
        run(deep, prompts(3), logits_hook=lambda *a: None)


def test_tokens_hook(deep, prompts, run):
    """A rule of the caller's: one token is masked again wherever it appears, until the last steps."""
    steps = []

    free = run(deep, prompts(6))
    three = int(new(free).flatten().mode().values)

    def again(step, x):
        steps.append(step)
        x[:, 7:][(x[:, 7:] == three) & (step < 20)] = MASK
        return x

    out = run(deep, prompts(6), tokens_hook=again)
    assert steps == list(range(24))
    assert not (out.history[:20, :, 7:] == three).any() and (out.sequences != MASK).all()
    with pytest.raises(ValueError, match=r"tokens_hook returned torch.float32 \[6, 31\], wanted torch.int64 \[6, 31\]"):
        run(deep, prompts(6), tokens_hook=lambda step, x: x.float())


def test_what_a_tokens_hook_masks_in_a_full_row_is_filled_again(deep, prompts, run):
    def again(step, x):
        x[:, 10:13] = MASK if step == 5 else x[:, 10:13]
        return x

    out = run(deep, prompts(2), tokens_per_step=24, tokens_hook=again)
    assert (out.history == MASK).sum((1, 2)).tolist() == [0] * 5 + [6] + [0] * 18
    assert (out.filled_at[:, 10:13] == 6).all()


@pytest.mark.parametrize("options", [{"threshold": 0.4}, {"stop_at_eos": True}], ids=str)
def test_hooks_see_the_whole_batch_also_where_rows_finish(deep, prompts, run, options, monkeypatch):
    monkeypatch.setattr(deep.config, "eos_token_id", int(new(run(deep, prompts(7))).flatten().mode().values))
    shapes = set()

    def watch(step, x):
        shapes.add(tuple(x.shape))
        return x

    expected = run(deep, prompts(7), **options)
    assert torch.equal(run(deep, prompts(7), tokens_hook=watch, **options).sequences, expected.sequences)
    assert shapes == {(7, 31)}


def test_a_tokens_hook_excludes_a_cache(deep, prompts, run):
    with pytest.raises(ValueError, match="set cache to none"):
        run(deep, prompts(1), block_length=8, cache="dual", tokens_hook=lambda step, x: x)
