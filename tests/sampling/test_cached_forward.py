"""Blocks from left to right, and what a KV cache holds."""

import pytest
import torch

MASK = 57
NOISY = {"steps": 12, "temperature": 1.0}
RULES = [{"steps": 12}, {"threshold": 0.3}, {"factor": 2.0}, {"tokens_per_step": 3}, NOISY]
every_cache = pytest.mark.parametrize("cache", ["prefix", "dual"])


def test_one_block_is_no_block(deep, prompts, run):
    a, b = run(deep, prompts(3), steps=9), run(deep, prompts(3), steps=9, block_length=24)
    assert torch.equal(a.history, b.history)


@every_cache
@pytest.mark.parametrize("rule", [*RULES, {"steps": 12, "alg": "origin"}], ids=str)
def test_a_cache_refreshed_at_every_step_changes_nothing(deep, ragged, run, rule, cache):
    plain = run(deep, *ragged[:2], block_length=8, **rule)
    cached = run(deep, *ragged[:2], block_length=8, cache=cache, refresh_every=1, **rule)
    assert torch.equal(plain.history, cached.history) and torch.equal(plain.forwards, cached.forwards)


@every_cache
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_cached_keys_of_one_layer_are_exact(shallow, ragged, run, rule, cache):
    """The keys and values of one layer depend on a position's own token only.

    The predictions still depend on all positions through attention: a wrong column, position, mask or shift at the
    border of a block shows.
    """
    plain = run(shallow, *ragged[:2], block_length=8, **rule)
    cached = run(shallow, *ragged[:2], block_length=8, cache=cache, **rule)
    assert torch.equal(plain.history, cached.history)
    torch.testing.assert_close(plain.confidence, cached.confidence)


def test_the_first_token_of_a_block_is_predicted_from_a_current_hidden_state(shallow, prompts, run, monkeypatch):
    """With the hidden state before the block taken from the last refresh, the first tokens would change."""
    ids = prompts(8)
    right = run(shallow, ids, block_length=8, cache="dual").sequences
    forward, memory = shallow.model.forward, {}

    def stale(input_ids, mask, positions, cache, columns):
        hidden = forward(input_ids, mask, positions, cache, columns)
        if len(columns) == 31:
            memory.update(hidden=hidden)
            return hidden
        return torch.cat([memory["hidden"][:, columns[:1]], hidden[:, 1:]], dim=1)

    monkeypatch.setattr(shallow.model, "forward", stale)
    assert not torch.equal(run(shallow, ids, block_length=8, cache="dual").sequences, right)


@pytest.mark.parametrize(("cache", "end"), [("prefix", 31), ("dual", 23)])
def test_cached_keys_are_those_of_the_last_refresh(deep, prompts, run, cache, end):
    """Against keys and values replaced in a plain model, at the second step of the second block."""
    first, last = 15, 23
    options = {"block_length": 8, "steps": 24, "tokens_per_step": 1}
    out = run(deep, prompts(2), cache=cache, **options)
    at_refresh, now = out.history[7], out.history[8]  # states before steps 8 (computes all) and 9 (the window)
    kept, handles = {}, []

    def replace(module, inputs, output):  # keys and values before rotation are per position
        if module not in kept:
            kept[module] = output
            return output
        mixed = kept[module].clone()
        mixed[:, first - 1 : end] = output[:, first - 1 : end]
        return mixed

    for layer in deep.model.layers:
        handles += [x.register_forward_hook(replace) for x in (layer.self_attn.k_proj, layer.self_attn.v_proj)]
    with torch.no_grad():
        deep(at_refresh)
        logits = deep(now).logits[:, first - 1 : last - 1]
    for handle in handles:
        handle.remove()
    logits[..., MASK] = -torch.inf
    probs = logits.softmax(-1)
    best = (probs * (probs + 1e-10).log()).sum(-1).masked_fill(now[:, first:last] != MASK, -torch.inf).argmax(1)
    expected = now.clone()
    expected[[0, 1], first + best] = probs.argmax(-1)[[0, 1], best]
    assert torch.equal(out.history[9], expected)
    assert not torch.equal(out.history, run(deep, prompts(2), **options).history)


@pytest.mark.parametrize(
    ("options", "shapes"),
    [
        ({"tokens_per_step": 4, "cache": "dual", "steps": 12}, [[2, 31], [2, 9]] * 3),
        ({"tokens_per_step": 4, "cache": "prefix"}, [[2, 31], [2, 25], [2, 31], [2, 17], [2, 31], [2, 9]]),
        ({"tokens_per_step": 2, "cache": "dual", "refresh_every": 3}, [[2, 31], [2, 9], [2, 9], [2, 31]] * 3),
    ],
    ids=str,
)
def test_what_a_step_computes(deep, prompts, run, calls, options, shapes):
    seen = calls(deep)
    run(deep, prompts(2), block_length=8, **options)
    assert seen == shapes
