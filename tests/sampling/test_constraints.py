"""What the caller demands of the tokens."""

import pytest
import torch

from dream_lightning.sampling import SamplingParams
from dream_lightning.sampling.canvas import prepare
from dream_lightning.sampling.denoise import _ORDER, _TOKEN, _noise

MASK, EOS = 57, 59
WAYS = [{"steps": 12}, {"threshold": 0.4}, {"block_length": 8, "cache": "dual", "steps": 12}]


def new(out):
    return out.sequences[:, 7:]


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_banned_tokens(deep, prompts, run, way):
    free = new(run(deep, prompts(6), **way))
    banned = free.flatten().unique()[:10].tolist()
    kept = new(run(deep, prompts(6), banned_tokens=banned, **way))
    assert not torch.isin(kept, torch.tensor(banned)).any()
    assert torch.equal(new(run(deep, prompts(6), banned_tokens=[], **way)), free)


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_required_tokens(deep, prompts, run, way, monkeypatch, calls):
    free = new(run(deep, prompts(6), **way))
    absent = [token for token in range(50) if not (free == token).any(1).all()][:3]
    monkeypatch.setattr(deep.config, "eos_token_id", int(free.flatten().mode().values))
    seen = calls(deep)
    out = run(deep, prompts(6), required_tokens=absent, **way)
    assert int(out.forwards.max()) == len(seen)
    for row in out.sequences[:, 7:].tolist():
        assert set(absent) <= set(row)
        until_eos = row[: row.index(deep.config.eos_token_id)] if deep.config.eos_token_id in row else row
        assert set(absent) <= set(until_eos)
    alone = run(deep, prompts(6)[2:3], required_tokens=absent, **way)
    assert torch.equal(alone.sequences[0], out.sequences[2])


def test_a_required_token_takes_the_likeliest_place(deep, prompts, run):
    ids = prompts(3)
    with torch.no_grad():
        log_p = deep(torch.nn.functional.pad(ids, (0, 24), value=MASK)).logits[:, 6:-1].log_softmax(-1)
    states = run(deep, ids, required_tokens=[5, 5], steps=24).history[0, :, 7:]
    best = log_p[:, :, 5].topk(2).indices
    assert (states.gather(1, best) == 5).all()


def test_required_tokens_need_room(deep, prompts, run):
    ids = prompts(1)
    ids[0, 3] = MASK
    with pytest.raises(ValueError, match=r"required_tokens are 2, and a row has 1 masks"):
        run(deep, ids, infill=True, max_new_tokens=0, required_tokens=[4, 5])


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_forced_prefix_and_suffix(deep, prompts, run, way):
    out = run(deep, prompts(3), forced_prefix=[1, 2], forced_suffix=[3], **way)
    assert (new(out)[:, :2] == torch.tensor([1, 2])).all() and (new(out)[:, -1] == 3).all()
    assert (out.sequences != MASK).all()
    assert (out.filled_at[:, 7:9] == -1).all()
    assert not torch.equal(new(out)[:, 2:-1], new(run(deep, prompts(3), **way))[:, 2:-1])
    by_hand = torch.cat([prompts(3), torch.tensor([[1, 2]]).expand(3, 2)], 1)
    if "block_length" not in way:
        prefixed = run(deep, prompts(3), forced_prefix=[1, 2], **way)
        assert torch.equal(prefixed.sequences, run(deep, by_hand, **way, max_new_tokens=22).sequences)


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_eos_not_too_early(deep, prompts, run, way, monkeypatch):
    eos = int(new(run(deep, prompts(6), **way)).flatten().mode().values)
    monkeypatch.setattr(deep.config, "eos_token_id", eos)
    count = [int((new(run(deep, prompts(6), eos_penalty=p, **way)) == eos).sum()) for p in (-5.0, 0.0, 1e9)]
    assert count == sorted(count, reverse=True) and count[-1] == 0 and len(set(count)) == 3
    late = new(run(deep, prompts(6), min_new_tokens=10, **way))
    assert not (late[:, :10] == eos).any() and (late[:, 10:] == eos).any()


def test_several_sequences(deep, prompts, run):
    options = {"temperature": 1.0, "sample_ids": torch.tensor([4, 9])}
    out = run(deep, prompts(2), num_return_sequences=3, **options).sequences
    assert out.shape == (6, 31)
    assert (out[:3, :7] == prompts(2)[0]).all() and (out[3:, :7] == prompts(2)[1]).all()
    assert len({tuple(row.tolist()) for row in out}) == 6
    assert torch.equal(out[::3], run(deep, prompts(2), **options).sequences)
    with pytest.raises(ValueError, match="without noise all would be the same"):
        run(deep, prompts(2), num_return_sequences=2)
    with pytest.raises(ValueError, match="num_return_sequences is 0"):
        run(deep, prompts(2), num_return_sequences=0, temperature=1.0)


def test_sequences_share_no_noise_for_whatever_purpose(deep, prompts):
    canvas = prepare(deep.config, prompts(1), None, SamplingParams(max_new_tokens=8)).repeat(3)
    noise = torch.cat([_noise(canvas, 0, 0, purpose) for purpose in (_TOKEN, _ORDER)])  # [6, L]
    assert len(noise.flatten().unique()) == noise.numel()


@pytest.mark.parametrize("way", [{"steps": 12}, {"block_length": 8, "cache": "dual"}, {"tokens_per_step": 3}], ids=str)
def test_logits_hook(deep, prompts, run, way):
    seen = set()

    def only_even(step, x, logits, row, column):
        assert logits.dtype == torch.float32 and logits.shape == (len(row), 60)
        assert (x[row, column] == MASK).all()
        seen.add(step)
        logits[:, 1::2] = -torch.inf
        return logits

    out = run(deep, prompts(3), logits_hook=only_even, **way)
    assert (new(out) % 2 == 0).all()
    assert seen == set(out.filled_at.unique().tolist()) - {-1}
    with pytest.raises(ValueError, match=r"logits_hook returned NoneType, wanted the logits \[72, 60\]"):
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


def test_hooks_refuse_what_they_would_break(deep, prompts, run):
    def hook(*a):
        raise AssertionError("not called")

    for options in ({"stop_at_eos": True}, {"threshold": 0.5}, {"factor": 1.0}):
        for name in ("logits_hook", "tokens_hook"):
            with pytest.raises(ValueError, match="hooks see the whole batch"):
                run(deep, prompts(1), **options, **{name: hook})
    with pytest.raises(ValueError, match="set cache to none"):
        run(deep, prompts(1), block_length=8, cache="dual", tokens_hook=hook)


def test_an_eos_penalty_does_not_forbid_eos_in_the_gaps_of_a_prompt(deep, prompts, run, monkeypatch):
    ids = prompts(8)
    ids[:, 3:5] = MASK
    free = run(deep, ids, infill=True)
    monkeypatch.setattr(deep.config, "eos_token_id", int(free.sequences[:, 3:5].flatten().mode().values))
    assert torch.equal(run(deep, ids, infill=True, eos_penalty=1e-9).history, free.history)
    later = run(deep, ids, infill=True, min_new_tokens=20).sequences
    assert not (later[:, 3:27] == deep.config.eos_token_id).any()


def test_infilling_goes_with_adaptive_counts(deep, prompts, run):
    ids = prompts(3)
    ids[0, 2:4] = ids[1, 5] = MASK
    for way in ({"threshold": 0.4}, {"factor": 1.0}, {"tokens_per_step": 2}):
        out = run(deep, ids, infill=True, max_new_tokens=0, **way)
        assert (out.sequences != MASK).all() and (out.sequences == ids)[ids != MASK].all()
        assert out.forwards[2] == 0
