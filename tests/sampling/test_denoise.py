"""What must hold of generation whatever the model, the rule and the cache."""

import itertools

import pytest
import torch

from dream_lightning.sampling import SamplingParams, denoising_steps
from dream_lightning.sampling.cached_forward import CachedForward, locate
from dream_lightning.sampling.canvas import ORDER, TOKEN, Canvas, prepare
from dream_lightning.sampling.denoise import reverse_process
from dream_lightning.sampling.unmasking import rule_of

MASK, PAD, NEW = 57, 59, 24
NOISY = {"temperature": 1.0, "alg_temp": 0.3}
RULES = [
    {"steps": 12}, {"steps": 12, "alg": "maskgit_plus", **NOISY},
    {"steps": 12, "alg": "topk_margin", "temperature": 0.5, "top_p": 0.9, "top_k": 7},
    {"steps": 12, "alg": "origin", "temperature": 0.7}, {"tokens_per_step": 3},
    {"threshold": 0.4, "alg": "maskgit_plus"}, {"factor": 2.0},
]  # fmt: skip
CACHES = [
    {}, {"block_length": 8}, {"block_length": 8, "cache": "prefix"}, {"block_length": 8, "cache": "dual"},
    {"block_length": 8, "cache": "dual", "refresh_every": 3},
]  # fmt: skip
every_rule = pytest.mark.parametrize("rule", RULES, ids=str)
every_cache = pytest.mark.parametrize("cache", CACHES, ids=str)


@every_rule
@every_cache
def test_the_answer_of_a_row_depends_on_neither_batch_nor_order_nor_padding(deep, ragged, run, rule, cache):
    ids, mask, padding = ragged
    sample_ids, order = torch.tensor([3, 1, 9]), torch.tensor([2, 0, 1])
    together = run(deep, ids, mask.long(), sample_ids=sample_ids, **rule, **cache)
    reordered = run(deep, ids[order], mask[order], sample_ids=sample_ids[order], **rule, **cache)
    assert torch.equal(reordered.history, together.history[:, order])
    for b in range(3):
        alone = run(deep, ids[b : b + 1, padding[b] :], sample_ids=sample_ids[b : b + 1], **rule, **cache)
        assert torch.equal(alone.history[:, 0], together.history[:, b, padding[b] :])
        assert torch.equal(alone.filled_at[0], together.filled_at[b, padding[b] :])
        assert alone.forwards[0] == together.forwards[b]


@pytest.mark.parametrize(
    ("rule", "most"), [(RULES[1], NEW), ({"tokens_per_step": 1}, NEW), ({"threshold": 0.4, "steps": 9}, 20)], ids=str
)
def test_rows_that_end_at_max_length_are_those_of_their_own_number_of_tokens(deep, ragged, run, rule, most):
    ids, mask, padding = ragged
    together = run(deep, ids, mask, max_length=30, max_new_tokens=most, **rule)
    assert together.sequences.shape[1] == 12 + min(most, 23)
    for b, start in enumerate(padding.tolist()):
        size = min(most, 30 - (12 - start))
        options = {"sample_ids": torch.tensor([b]), "max_new_tokens": size, **rule}
        alone = run(deep, ids[b : b + 1, start:], **options)
        assert torch.equal(alone.history[:, 0], together.history[:, b, start : 12 + size])
        assert torch.equal(alone.filled_at[0], together.filled_at[b, start : 12 + size])
        assert alone.forwards[0] == together.forwards[b]
        assert (together.history[:, b, 12 + size :] == PAD).all() and (together.filled_at[b, 12 + size :] == -1).all()


@pytest.mark.parametrize("cache", CACHES[1:], ids=str)
@pytest.mark.parametrize("max_length", [30, 20])  # the last block is partly or wholly outside
def test_blocks_fill_the_masks_before_max_length_and_nothing_else(deep, ragged, run, cache, max_length):
    ids, mask, padding = ragged
    options = {"max_length": max_length, "threshold": 0.3, "steps": 9, **cache}
    out = run(deep, ids, mask, **options)
    column = torch.arange(out.sequences.shape[1]) - 12
    inside = (column >= 0) & (column < max_length - mask.sum(1, keepdim=True))
    assert torch.equal(out.filled_at >= 0, inside) and (out.sequences != MASK).all()
    assert torch.equal((out.filled_at // 3)[inside], (column // 8).expand_as(inside)[inside])
    assert (out.sequences[:, 12:][~inside[:, 12:]] == PAD).all()
    assert torch.equal(run(deep, ids, mask, run_every_step=True, **options).history, out.history)
    for b, start in enumerate(padding.tolist()):
        alone = run(deep, ids[b : b + 1, start:], sample_ids=torch.tensor([b]), **options).history[:, 0]
        assert torch.equal(alone, out.history[:, b, start : start + alone.shape[1]])


@every_rule
@every_cache
def test_only_masks_change_and_the_output_says_when_and_how_certainly(deep, prompts, run, rule, cache):
    out = run(deep, prompts(3), **rule, **cache)
    steps = rule.get("steps", NEW)
    assert out.history.shape == (steps, 3, 7 + NEW) and torch.equal(out.sequences, out.history[-1])
    assert (out.sequences != MASK).all()
    before = torch.nn.functional.pad(prompts(3), (0, NEW), value=MASK)
    for step, after in enumerate(out.history):
        assert (after == before)[before != MASK].all()
        assert torch.equal(out.filled_at == step, before != after)
        before = after
    assert (out.filled_at[:, :7] == -1).all() and (out.confidence[:, :7] == 0).all()
    assert ((out.confidence[:, 7:] > 0) & (out.confidence[:, 7:] <= 1)).all()
    assert out.forwards.tolist() == [len(row.unique()) - 1 for row in out.filled_at]
    for block, filled_at in enumerate(out.filled_at[:, 7:].split(8, dim=1) if cache else ()):
        assert (filled_at // (steps // 3) == block).all()


@every_rule
@every_cache
def test_forwards_at_every_step_change_nothing(deep, prompts, run, calls, rule, cache):
    """Ranks that share a sharded model make the same number of forwards."""
    seen = calls(deep)
    expected = run(deep, prompts(5), **rule, **cache)
    assert len(seen) <= rule.get("steps", NEW)
    seen.clear()
    assert torch.equal(run(deep, prompts(5), run_every_step=True, **rule, **cache).history, expected.history)
    assert len(seen) == rule.get("steps", NEW)


@pytest.mark.parametrize(
    ("options", "forwards"), [({"steps": 20}, 3), ({"steps": 9, "alg": "origin"}, 3), ({"threshold": 1e-9}, 1)], ids=str
)
def test_steps_that_fill_nothing_cost_no_forward(deep, prompts, run, calls, options, forwards):
    seen = calls(deep)
    out = run(deep, prompts(1), max_new_tokens=3, **options)
    assert len(seen) <= forwards and len(seen) == int(out.forwards)


def test_the_schedule_is_the_authors(deep, prompts, run):
    # int(remaining · (1 − s/t)): 12 → 2 → 1, 2, 2, 2 and the rest, by hand from t = 1, 0.8335, 0.667, …
    left = (run(deep, prompts(2), max_new_tokens=12, steps=6).history == MASK).sum(-1)
    assert left.tolist() == [[11, 11], [9, 9], [7, 7], [5, 5], [3, 3], [0, 0]]


def test_origin_fills_equal_shares(shallow, prompts, run):
    # 400 rows of 12 masks: at every step about 1/6 of the 12, by linearity of t.
    out = run(shallow, prompts(400), max_new_tokens=12, steps=6, alg="origin")
    expected = torch.linspace(1, 1e-3, 7)[1:]
    expected[-1] = 0
    torch.testing.assert_close((out.history == MASK).float().mean((1, 2)) * 19 / 12, expected, rtol=0, atol=0.03)


def test_noise_is_a_function_of_seed_and_sample(deep, prompts, run):
    ids = prompts(1).repeat(4, 1)
    out = run(deep, ids, sample_ids=torch.tensor([0, 1, 2, 1]), **NOISY).sequences
    assert torch.equal(out[1], out[3]) and len({tuple(row.tolist()) for row in out}) == 3
    assert not torch.equal(run(deep, ids, seed=1, **NOISY).sequences, run(deep, ids, **NOISY).sequences)


def test_tokens_and_their_order_have_noise_of_their_own(deep, prompts, run, monkeypatch):
    asked, uniforms = [], Canvas.uniforms
    monkeypatch.setattr(Canvas, "uniforms", lambda *a: (asked.append(a[2:]), uniforms(*a))[1])
    run(deep, prompts(1), steps=2, **NOISY)
    assert asked == [(0, TOKEN), (0, ORDER), (1, TOKEN), (1, ORDER)]


NOISY_DEFAULT, BLOCKS, STOP = {"temperature": 1.0, "steps": 4}, {"block_length": 8}, {"stop_at_eos": True}


@pytest.mark.parametrize(
    ("default", "changed"),
    [(NOISY_DEFAULT, {name: value}) for name, value in
     [("alg", "maskgit_plus"), ("alg", "origin"), ("temperature", 0.5), ("top_k", 3), ("top_p", 0.5),
      ("alg_temp", 0.5), ("eps", 0.5), ("steps", 8), ("seed", 1)]]
    + [({}, BLOCKS), ({}, {"tokens_per_step": 4}), ({"threshold": 0.4}, {"threshold": 0.8}),
       ({"factor": 0.5}, {"factor": 3.0}),
       ({**BLOCKS, "cache": "dual", "threshold": 0.4}, {"threshold": None, "fast_dllm_threshold": 0.4}),
       (BLOCKS, {"cache": "prefix"}), (BLOCKS, {"cache": "dual"}),
       ({**BLOCKS, "cache": "dual"}, {"cache": "prefix"}), ({**BLOCKS, "cache": "dual"}, {"refresh_every": 2})],
    ids=str,
)  # fmt: skip
def test_every_option_changes_the_answer(deep, prompts, run, default, changed):
    before, after = (run(deep, prompts(16), **options) for options in (default, {**default, **changed}))
    assert not torch.equal(before.sequences, after.sequences)


@every_rule
@pytest.mark.parametrize("padding", [0, 4])
def test_infilling(deep, prompts, run, rule, padding):
    """Also from the first token on, which has none before it and is predicted from itself, whatever the padding."""
    ids = prompts(4)
    ids[0, 2:4] = ids[1, 5] = ids[2, :2] = MASK
    mask = torch.arange(7 + padding).expand(4, -1) >= padding
    for new in (0, NEW):
        options = {"infill": True, "max_new_tokens": new, **rule}
        out = run(deep, torch.nn.functional.pad(ids, (padding, 0), value=PAD), mask, **options)
        sequences = out.sequences[:, padding:]
        assert (sequences != MASK).all() and (sequences[:, :7] == ids)[ids != MASK].all()
        assert new or out.forwards[3] == 0
        for b in range(4):
            alone = run(deep, ids[b : b + 1], sample_ids=torch.tensor([b]), **options)
            assert torch.equal(alone.sequences[0], sequences[b])


def test_several_sequences(deep, prompts, run):
    options = {"temperature": 1.0, "sample_ids": torch.tensor([4, 9])}
    out = run(deep, prompts(2), num_return_sequences=3, **options).sequences
    assert torch.equal(out[:, :7], prompts(2).repeat_interleave(3, 0))
    assert len({tuple(row.tolist()) for row in out}) == 6
    assert torch.equal(out[::3], run(deep, prompts(2), **options).sequences)
    canvas = prepare(deep.config, prompts(1), None, SamplingParams(max_new_tokens=8)).repeat(3)
    noise = torch.cat([canvas.uniforms(0, 0, purpose) for purpose in (0, 1)])  # [6, L]
    assert len(noise.unique()) == noise.numel()


@every_rule
@every_cache
def test_stopping_at_eos_does_not_change_the_text(talker, prompts, run, rule, cache):
    eos, ids = talker.config.eos_token_id, prompts(11)
    long, short = (run(talker, ids, stop_at_eos=stop, **rule, **cache) for stop in (False, True))
    for before, after in zip(long.sequences[:, 7:].tolist(), short.sequences[:, 7:].tolist(), strict=True):
        end = before.index(eos) + 1 if eos in before else NEW
        assert after[:end] == before[:end]
    assert (short.sequences != MASK).all()
    assert (short.forwards <= long.forwards).all() and (short.forwards < long.forwards).any()
    skipped = (short.filled_at == -1)[:, 7:]  # after the first eos
    assert skipped.any() and (short.sequences[:, 7:][skipped] == eos).all()
    assert (short.confidence[:, 7:][skipped] == 0).all()


@pytest.mark.parametrize(
    "options", [STOP, {**STOP, **BLOCKS}, {**STOP, **BLOCKS, "cache": "dual"}, {"threshold": 0.4}], ids=str
)
def test_finished_rows_leave_the_batch(talker, prompts, run, calls, options):
    seen = calls(talker)
    run(talker, prompts(11), **options)
    rows = [shape[0] for shape in seen]
    assert rows == sorted(rows, reverse=True) and set(rows) <= {11, 8, 4, 2, 1} and len(set(rows)) > 1
    if "cache" in options:  # at the start of a block only, where everything is computed
        assert all(after[0] == before[0] or after[1] == 31 for before, after in itertools.pairwise(seen))


class Scripted(CachedForward):
    """Predicts the same token everywhere in a row."""

    def __init__(self, canvas, params, tokens, finite_steps):
        super().__init__(None, canvas, params)
        self.tokens, self.finite_steps = torch.tensor(tokens), finite_steps

    def __call__(self, x, row, column, step_of_block):
        value = 1.0 if step_of_block < self.finite_steps else torch.nan
        return torch.nn.functional.one_hot(self.tokens[row], 60) * value


def denoised(config, ids, params, tokens, finite_steps=99):
    predict = Scripted(prepare(config, ids, None, params), params, tokens, finite_steps)
    *_, end = reverse_process(predict, params, rule_of(params))
    return end


@pytest.mark.parametrize("forbid_mask", [False, True])
def test_a_predicted_mask_remains_unless_forbidden(deep, prompts, forbid_mask):
    params = SamplingParams(max_new_tokens=4, steps=4, forbid_mask=forbid_mask)
    end = denoised(deep.config, prompts(2), params, [MASK, MASK])
    assert (end.x[:, 7:] == (0 if forbid_mask else MASK)).all()
    assert ((end.filled_at[:, 7:] >= 0) == forbid_mask).all() and ((end.forwards > 0) == forbid_mask).all()


def test_an_average_above_the_masks_of_a_row_overwrites_the_row_with_masks_as_the_authors_do(deep, prompts):
    """Without forbid_mask, at temperature 0, the count is the mean of the rows' masks: here (5 + 8 + 5) / 3."""
    ids, params = prompts(3), SamplingParams(max_new_tokens=8, steps=2)
    end = denoised(deep.config, ids, params, [3, MASK, 3])
    assert (end.x[1, 7:] == MASK).all() and torch.equal(end.x[1, :7], ids[1])
    for row in (0, 2):
        kept = torch.cat([ids[row], torch.full((8,), 3)])
        lost = end.x[row] != kept
        assert lost.sum() == 1 and (end.x[row][lost] == MASK).all()


@pytest.mark.parametrize(
    ("options", "averaged"),
    [({}, True), ({"temperature": 0.01}, False), ({"alg_temp": 1.0}, False), ({"forbid_mask": True}, False)],
    ids=str,
)
def test_only_without_noise_a_row_counts_the_masks_of_the_others(deep, prompts, options, averaged):
    """Two rows, of which one predicts masks only: the other one's count is its own, unless it follows the authors."""
    ids = prompts(2)
    params = SamplingParams(max_new_tokens=8, steps=2, **options)
    together = denoised(deep.config, ids, params, [3, MASK])
    alone = denoised(deep.config, ids[:1], params, [3])
    same = torch.equal(together.x[0], alone.x[0]) and torch.equal(together.filled_at[0], alone.filled_at[0])
    assert same != averaged


def test_a_row_that_is_infilled_counts_its_own_masks(deep, prompts, run):
    ids = prompts(2, length=20)
    ids[0, 2:6] = ids[1, 2:18] = MASK
    options = {"infill": True, "max_new_tokens": 0, "steps": 4, "forbid_mask": False}
    together, alone = run(deep, ids, **options), run(deep, ids[:1], **options)
    assert torch.equal(together.history[:, 0], alone.history[:, 0])


@pytest.mark.parametrize("first", [0, 2, 3])
@pytest.mark.parametrize("options", [{"temperature": 1.0}, {}, {"threshold": 0.9}], ids=str)
def test_logits_that_are_not_finite_are_reported_with_their_step(deep, prompts, options, first):
    params = SamplingParams(max_new_tokens=8, steps=4, forbid_mask=True, **options)
    with pytest.raises(ValueError, match=f"not finite at step {first}"):
        denoised(deep.config, prompts(1), params, [1], finite_steps=first)


def test_modes_are_restored_and_no_gradient_is_kept(deep, prompts):
    deep.train()
    deep.model.norm.eval()
    try:
        steps = denoising_steps(deep, prompts(1), params=SamplingParams(max_new_tokens=4, steps=4))
        next(steps)
        assert not deep.training and torch.is_grad_enabled()
        steps.close()
        assert deep.training and deep.lm_head.training and not deep.model.norm.training
    finally:
        deep.eval()


@pytest.mark.gpu
@pytest.mark.parametrize("cache", CACHES, ids=str)
@pytest.mark.parametrize("rule", [{"steps": 12}, {"tokens_per_step": 3}, {"steps": 12, **NOISY}], ids=str)
def test_known_counts_synchronize_with_the_gpu_only_at_the_ends_of_blocks(deep, prompts, rule, cache):
    params = SamplingParams(**{"max_new_tokens": NEW, "steps": NEW, "forbid_mask": True, **rule, **cache})
    deep.to("cuda")
    try:
        for checked in (False, True):  # the first run warms up
            steps = denoising_steps(deep, prompts(3).cuda(), params=params)
            for step in range(params.steps):
                inside = 0 < step % (params.steps // params.blocks) < params.steps // params.blocks - 1
                torch.cuda.set_sync_debug_mode("error" if checked and inside else "default")
                next(steps)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        deep.to("cpu")


def test_locating_is_nonzero():
    where = torch.rand(5, 9, generator=torch.Generator().manual_seed(0)) < 0.4
    number = int(where.sum())
    for at_least in (number, number + 6):
        row, column, index = locate(where, at_least)
        assert torch.equal(torch.stack([row, column], 1)[:number], where.nonzero())
        assert torch.equal(index[where], torch.arange(number)) and index.min() >= -1 and index.max() < number
        assert len(row) == at_least and not row[number:].any() and not column[number:].any()
