"""What must hold of generation whatever the model."""

from types import SimpleNamespace

import pytest
import torch

from dream_lightning.model import DreamConfig, DreamModel
from dream_lightning.sampling import (
    CompiledDenoiser,
    SamplingParams,
    denoising_steps,
    diffusion_generate,
    reverse_process,
)
from dream_lightning.sampling.canvas import prepare

VOCABULARY, MASK, PAD = 60, 57, 59
ALGORITHMS = ("origin", "maskgit_plus", "topk_margin", "entropy")
NOISY = {"temperature": 1.0, "alg_temp": 0.3}


@pytest.fixture(scope="module")
def model():
    config = DreamConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        mask_token_id=MASK,
        pad_token_id=PAD,
        bos_token_id=58,
        eos_token_id=PAD,
        initializer_range=0.4,  # large, so that the predictions differ from place to place
    )
    torch.manual_seed(0)
    return DreamModel(config).eval()


def prompts(rows, length=7, seed=0):
    return torch.randint(0, MASK, (rows, length), generator=torch.Generator().manual_seed(seed))


def generate(model, input_ids, attention_mask=None, sample_ids=None, infill=False, run_every_step=False, **params):
    params = SamplingParams(**{"max_new_tokens": 12, "steps": 6, "forbid_mask": True, **params})
    return diffusion_generate(
        model,
        input_ids,
        attention_mask,
        params=params,
        return_history=True,
        sample_ids=sample_ids,
        infill=infill,
        run_every_step=run_every_step,
    )


def count_forwards(model, monkeypatch):
    calls, forward = [], model.model.forward
    monkeypatch.setattr(model.model, "forward", lambda *a, **k: (calls.append(1), forward(*a, **k))[1])
    return calls


@pytest.mark.parametrize("noise", [{}, NOISY], ids=["greedy", "noisy"])
@pytest.mark.parametrize("alg", ALGORITHMS)
def test_batch_of_one_equals_batch_of_many_in_any_order(model, alg, noise):
    ids, sample_ids = prompts(5), torch.tensor([3, 1, 4, 15, 9])
    together = generate(model, ids, sample_ids=sample_ids, alg=alg, **noise).history
    order = torch.tensor([2, 4, 0, 1, 3])
    reordered = generate(model, ids[order], sample_ids=sample_ids[order], alg=alg, **noise).history
    assert torch.equal(reordered, together[:, order])
    for b in range(5):
        alone = generate(model, ids[b : b + 1], sample_ids=sample_ids[b : b + 1], alg=alg, **noise).history
        assert torch.equal(alone[:, 0], together[:, b])


@pytest.mark.parametrize("noise", [{}, NOISY], ids=["greedy", "noisy"])
@pytest.mark.parametrize("alg", ALGORITHMS)
def test_left_padding_changes_nothing(model, alg, noise):
    ids, padding = prompts(3), torch.tensor([0, 2, 5])
    padded = torch.full((3, 12), PAD)
    attention_mask = torch.arange(12) >= padding[:, None]
    for b in range(3):
        padded[b, padding[b] :] = prompts(1, 12 - int(padding[b]), seed=b)
    out = generate(model, padded, attention_mask, alg=alg, **noise).history
    for b in range(3):
        ids = padded[b : b + 1, padding[b] :]
        alone = generate(model, ids, sample_ids=torch.tensor([b]), alg=alg, **noise).history
        assert torch.equal(out[:, b, padding[b] :], alone[:, 0])
    as_integers = generate(model, padded, attention_mask.long(), alg=alg, **noise).history
    assert torch.equal(as_integers, out)


@pytest.mark.parametrize("noise", [{}, NOISY, {"temperature": 0.5, "top_p": 0.9, "top_k": 7}])
@pytest.mark.parametrize("steps", [1, 5, 12, 30])
@pytest.mark.parametrize("alg", ALGORITHMS)
def test_only_masks_change_and_none_is_left(model, alg, steps, noise):
    ids = prompts(2)
    out = generate(model, ids, alg=alg, steps=steps, **noise)
    before = torch.nn.functional.pad(ids, (0, 12), value=MASK)
    assert out.history.shape == (steps, 2, 19)
    for after in out.history:
        assert (after == before)[before != MASK].all()
        before = after
    assert (out.sequences != MASK).all()
    assert torch.equal(out.sequences, out.history[-1])


def test_the_schedule_is_the_authors(model):
    # int(remaining · (1 − s/t)): 12 → 2 → 1, 2, 2, 2 and the rest, by hand from t = 1, 0.8335, 0.667, …
    left = (generate(model, prompts(2)).history == MASK).sum(-1)
    assert left.tolist() == [[11, 11], [9, 9], [7, 7], [5, 5], [3, 3], [0, 0]]


def test_origin_fills_equal_shares(model):
    # 400 rows of 12 masks: at every step about 1/6 of the 12, by linearity of t.
    left = (generate(model, prompts(400), alg="origin").history == MASK).float().mean((1, 2)) * 19 / 12
    expected = torch.linspace(1, 1e-3, 7)[1:]
    expected[-1] = 0
    torch.testing.assert_close(left, expected, rtol=0, atol=0.03)


def test_noise_has_an_address(model):
    ids = prompts(1).repeat(4, 1)
    out = generate(model, ids, sample_ids=torch.tensor([0, 1, 2, 1]), **NOISY).sequences
    assert torch.equal(out[1], out[3])
    assert len({tuple(row.tolist()) for row in out}) == 3
    assert not torch.equal(generate(model, ids, seed=1, **NOISY).sequences, generate(model, ids, **NOISY).sequences)


@pytest.mark.parametrize(
    "changed",
    [{"alg": "maskgit_plus"}, {"alg": "origin"}, {"temperature": 0.5}, {"top_k": 3}, {"alg_temp": 0.5}, {"eps": 0.5}],
)
def test_every_option_changes_the_answer(model, changed):
    default = {"temperature": 1.0, "steps": 4}
    ids = prompts(8)
    a, b = generate(model, ids, **default), generate(model, ids, **{**default, **changed})
    assert not torch.equal(a.sequences, b.sequences)


def test_batches_follow_the_softmax(model):
    rows = 3000
    ids = prompts(1).repeat(rows, 1)
    out = generate(model, ids, max_new_tokens=1, steps=1, temperature=1.0, forbid_mask=False).sequences[:, -1]
    with torch.no_grad():
        x = torch.nn.functional.pad(ids[:1], (0, 1), value=MASK)
        probs = model(x).logits[0, -2].softmax(-1)
    assert (torch.bincount(out, minlength=VOCABULARY) / rows - probs).abs().max() < 4 * (0.25 / rows) ** 0.5


def test_idle_steps_cost_no_forward(model, monkeypatch):
    calls = count_forwards(model, monkeypatch)
    a = generate(model, prompts(2), max_new_tokens=3, steps=20)
    assert 1 <= len(calls) <= 3
    calls.clear()
    b = generate(model, prompts(2), max_new_tokens=3, steps=20, run_every_step=True)
    assert len(calls) == 20
    assert torch.equal(a.history, b.history)


def test_origin_forwards_on_request(model, monkeypatch):
    calls = count_forwards(model, monkeypatch)
    a = generate(model, prompts(1), alg="origin", max_new_tokens=2, steps=9)
    assert len(calls) <= 2
    calls.clear()
    b = generate(model, prompts(1), alg="origin", max_new_tokens=2, steps=9, run_every_step=True)
    assert len(calls) == 9
    assert torch.equal(a.history, b.history)


@pytest.mark.parametrize("alg", ALGORITHMS)
def test_infilling(model, alg):
    ids = prompts(3)
    ids[0, 2:4] = MASK
    ids[1, 5] = MASK
    out = generate(model, ids, infill=True, alg=alg).sequences
    assert (out != MASK).all()
    assert (out[:, :7] == ids)[ids != MASK].all()
    only = generate(model, ids, infill=True, alg=alg, max_new_tokens=0).sequences
    assert only.shape == ids.shape and (only != MASK).all()
    for b in range(3):
        alone = generate(model, ids[b : b + 1], infill=True, alg=alg, sample_ids=torch.tensor([b])).sequences
        assert torch.equal(alone[0], out[b])


@pytest.mark.parametrize("alg", ALGORITHMS)
def test_infilling_from_the_first_token_on_is_blind_to_padding(model, alg):
    """The first token of a row has none before it, whatever the padding: it is predicted from itself."""
    ids = prompts(3)
    ids[:, :2] = MASK
    alone = generate(model, ids, infill=True, alg=alg).history
    padded = torch.cat([torch.full((3, 4), PAD), ids], 1)
    attention_mask = torch.arange(11).expand(3, 11) >= 4
    assert torch.equal(generate(model, padded, attention_mask, infill=True, alg=alg).history[..., 4:], alone)
    assert torch.equal(generate(CompiledDenoiser(model, capture=False), ids, infill=True, alg=alg).history, alone)


class Always:
    """Predicts one token everywhere."""

    def __init__(self, token, value=9.0):
        self.token, self.value = token, value

    def start_block(self, first, last):
        pass

    def __call__(self, x, row, column, step_of_block):
        return torch.nn.functional.one_hot(torch.full((len(row),), self.token), VOCABULARY) * self.value


def test_a_predicted_mask_stays_unless_forbidden():
    config = SimpleNamespace(mask_token_id=MASK, vocab_size=VOCABULARY, max_position_embeddings=64)
    for forbid in (False, True):
        params = SamplingParams(max_new_tokens=4, steps=4, forbid_mask=forbid)
        canvas = prepare(config, prompts(2), None, params)
        *_, end = reverse_process(Always(MASK), canvas, params, mask_token_id=MASK)
        assert (end.x[:, 7:] == (0 if forbid else MASK)).all()
        assert ((end.filled_at[:, 7:] >= 0) == forbid).all() and ((end.forwards > 0) == forbid).all()


def test_too_many_for_a_row_overwrite_it_with_masks_as_the_authors_do():
    """Without forbid_mask, at temperature 0, the count is the mean of the rows' masks: here (5 + 8 + 5) / 3."""
    config = SimpleNamespace(mask_token_id=MASK, vocab_size=VOCABULARY, max_position_embeddings=64)

    class Undecided(Always):
        def __call__(self, x, row, column, step_of_block):
            return torch.nn.functional.one_hot(torch.where(row == 1, MASK, 3), VOCABULARY) * self.value

    ids, params = prompts(3), SamplingParams(max_new_tokens=8, steps=2)
    *_, end = reverse_process(Undecided(3), prepare(config, ids, None, params), params, mask_token_id=MASK)
    assert (end.x[1, 7:] == MASK).all() and torch.equal(end.x[1, :7], ids[1])
    for row in (0, 2):
        kept = torch.cat([ids[row], torch.full((8,), 3)])
        lost = end.x[row] != kept
        assert lost.sum() == 1 and (end.x[row][lost] == MASK).all()


def test_watching_gives_the_same_states(model):
    params = SamplingParams(max_new_tokens=8, steps=5)
    states = list(denoising_steps(model, prompts(2), params=params))
    out = diffusion_generate(model, prompts(2), params=params, return_history=True)
    assert torch.equal(torch.stack(states), out.history)
    assert diffusion_generate(model, prompts(2), params=params).history is None


def test_modes_come_back_and_no_gradient_is_kept(model):
    model.train()
    model.model.norm.eval()
    try:
        steps = denoising_steps(model, prompts(1), params=SamplingParams(max_new_tokens=4, steps=4))
        next(steps)
        assert not model.training and torch.is_grad_enabled()
        steps.close()
        assert model.training and model.lm_head.training and not model.model.norm.training
    finally:
        model.eval()


@pytest.mark.parametrize("first", [0, 2, 3])
@pytest.mark.parametrize(
    "options", [{"temperature": 1.0}, {"forbid_mask": True}, {"forbid_mask": True, "threshold": 0.9}], ids=str
)
def test_logits_that_are_not_finite(model, options, first):
    """Reported with their step, be it the last, and whether the host asks the device at every step or not."""
    params = SamplingParams(max_new_tokens=8, steps=4, **options)

    class Diverging(Always):
        forwards = 0

        def __call__(self, *args):
            self.forwards += 1
            return super().__call__(*args) * (torch.nan if self.forwards > first else 1.0)

    predict = Diverging(1, value=1.0)
    with pytest.raises(ValueError, match=f"not finite at step {first}"):
        list(reverse_process(predict, prepare(model.config, prompts(1), None, params), params, mask_token_id=MASK))


@pytest.mark.parametrize("alg", ALGORITHMS)
def test_where_and_how_surely_every_token_was_filled(model, alg):
    out = generate(model, prompts(3), alg=alg, steps=5)
    before = torch.nn.functional.pad(prompts(3), (0, 12), value=MASK)
    for step, after in enumerate(out.history):
        assert torch.equal(out.filled_at == step, before != after)
        before = after
    assert (out.filled_at[:, :7] == -1).all() and (out.confidence[:, :7] == 0).all()
    assert ((out.confidence[:, 7:] > 0) & (out.confidence[:, 7:] <= 1)).all()
    assert out.forwards.tolist() == [len(row.unique()) - 1 for row in out.filled_at]
