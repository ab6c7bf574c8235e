"""Banned tokens, a minimum length, hooks."""

import pytest
import torch

MASK = 57
RULES = [{"steps": 12}, {"threshold": 0.4}, {"block_length": 8, "cache": "dual", "steps": 12}]
every_rule = pytest.mark.parametrize("rule", RULES, ids=str)


def new(out):
    return out.sequences[:, 7:]


@every_rule
def test_banned_tokens(deep, prompts, run, rule):
    free = new(run(deep, prompts(6), **rule))
    banned = free.flatten().unique()[:10].tolist()
    kept = new(run(deep, prompts(6), banned_tokens=banned, **rule))
    assert not torch.isin(kept, torch.tensor(banned)).any()
    assert torch.equal(new(run(deep, prompts(6), banned_tokens=[], **rule)), free)


@every_rule
def test_no_eos_before_the_minimum_length(talker, prompts, run, rule):
    late = new(run(talker, prompts(6), min_new_tokens=10, **rule)) == talker.config.eos_token_id
    assert not late[:, :10].any() and late[:, 10:].any()


def test_the_minimum_length_holds_in_the_gaps_of_a_prompt(deep, prompts, run, monkeypatch):
    ids = prompts(8)
    ids[:, 3:5] = MASK
    free = run(deep, ids, infill=True)
    monkeypatch.setattr(deep.config, "eos_token_id", int(free.sequences[:, 3:5].flatten().mode().values))
    later = run(deep, ids, infill=True, min_new_tokens=20).sequences
    assert not (later[:, 3:27] == deep.config.eos_token_id).any()


@every_rule
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"logits_hook": lambda *a: None}, r"logits_hook returned NoneType, wanted torch.float32 \[144, 60\]"),
        (
            {"tokens_hook": lambda step, x: x.float()},
            "tokens_hook returned torch.float32 .*, wanted torch.int64",
        ),
        ({"tokens_hook": lambda step, x: x, "block_length": 8, "cache": "dual"}, "set cache to none"),
    ],
)
def test_wrong_hooks_are_refused(deep, prompts, run, options, message):
    with pytest.raises(ValueError, match=message):
        run(deep, prompts(6), **options)


def test_what_a_tokens_hook_masks_in_a_full_row_is_filled_again(deep, prompts, run):
    steps = []

    def again(step, x):
        steps.append(step)
        x[:, 10:13] = MASK if step == 5 else x[:, 10:13]
        return x

    out = run(deep, prompts(2), tokens_per_step=24, tokens_hook=again)
    assert steps == list(range(24))
    assert (out.history == MASK).sum((1, 2)).tolist() == [0] * 5 + [6] + [0] * 18
    assert (out.filled_at[:, 10:13] == 6).all()


@pytest.mark.parametrize("options", [{"threshold": 0.4}, {"stop_at_eos": True}], ids=str)
def test_hooks_see_the_whole_batch_also_where_rows_finish(talker, prompts, run, options):
    shapes = set()

    def watch(step, x):
        shapes.add(tuple(x.shape))
        return x

    expected = run(talker, prompts(7), **options)
    assert torch.equal(run(talker, prompts(7), tokens_hook=watch, **options).sequences, expected.sequences)
    assert shapes == {(7, 31)}
