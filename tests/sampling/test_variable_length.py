"""DreamOn: gaps that grow and shrink, against a plain reference with whole forwards."""

from collections import Counter

import pytest
import torch
from tiny_models import MASK

from dream_lightning.errors import UserError
from dream_lightning.sampling import SamplingParams, infill_variable_length

PARAMS = SamplingParams(max_new_tokens=0, forbid_mask=True)


def reference(model, ids, alg, longest, delete_rest):
    """The rules in the words of the paper, on lists; returns the ids and how often each kind of token was filled."""
    expand, delete = model.config.expand_token_id, model.config.eos_token_id
    fixed, seen = len(ids) - ids.count(MASK), Counter()
    while MASK in ids:
        logits = model(torch.tensor([ids])).logits[0].float()
        best = None
        for i in [i for i, token in enumerate(ids) if token == MASK]:
            row = logits[i - 1].clone()
            row[MASK] = -torch.inf
            if len(ids) == fixed + longest or seen["expand"] == longest:
                row[expand] = -torch.inf
            p = row.softmax(-1)
            top = p.topk(2).values
            sure = {"maskgit_plus": top[0], "topk_margin": top[0] - top[1], "entropy": (p * (p + 1e-10).log()).sum()}
            if best is None or sure[alg] > best[0]:
                best = sure[alg], i, int(p.argmax())
        _, i, token = best
        rest = ids[i + 1 :]
        if token == delete and delete_rest:
            rest = [token for token in rest if token != MASK]
        kind = {expand: "expand", delete: "delete"}.get(token, "token")
        seen[kind] += 1
        ids = ids[:i] + {"expand": [MASK, MASK], "delete": [], "token": [token]}[kind] + rest
    return ids, seen


@pytest.fixture
def dreamon(deep, prompts, run, monkeypatch):
    """A model whose expand token and eos are among those that it predicts most."""
    answers = run(deep, prompts(16), max_new_tokens=12, steps=12).sequences[:, 7:]
    common = Counter(answers.flatten().tolist()).most_common(2)
    for name, (token, _) in zip(("expand_token_id", "eos_token_id"), common, strict=True):
        monkeypatch.setattr(deep.config, name, token)
    return deep


@pytest.mark.parametrize(("alg", "delete_rest"), [("maskgit_plus", True), ("topk_margin", False), ("entropy", True)])
def test_every_text_is_that_of_the_reference(dreamon, prompts, alg, delete_rest):
    seen = Counter()
    for row in prompts(8, length=9).tolist():
        ids = [*row[:4], MASK, MASK, MASK, *row[4:6], MASK, *row[6:]]
        with torch.no_grad():
            expected, kinds = reference(dreamon, ids, alg, 7, delete_rest)
        seen += kinds
        params = SamplingParams(max_new_tokens=0, alg=alg)
        got = infill_variable_length(dreamon, torch.tensor(ids), params=params, longest=7, delete_rest=delete_rest)
        assert got.tolist() == expected
    assert min(seen[kind] for kind in ("expand", "delete", "token")) >= 1, seen


def test_noise_belongs_to_the_sample(dreamon, prompts):
    ids = torch.cat([prompts(1)[0], torch.full((4,), MASK)])
    noisy = SamplingParams(max_new_tokens=0, temperature=2.0)
    options = {"params": noisy, "longest": 8}
    texts = [infill_variable_length(dreamon, ids, sample_id=n, **options).tolist() for n in (0, 0, 1, 2, 3, 4)]
    assert texts[0] == texts[1] and len({tuple(text) for text in texts}) > 2


def test_sampling_of_a_fixed_length_never_predicts_the_expand_token(dreamon, prompts, run):
    assert (
        run(dreamon, prompts(16), max_new_tokens=12, steps=12).sequences[:, 7:] != dreamon.config.expand_token_id
    ).all()


def test_what_variable_lengths_do_not_know_is_refused(dreamon, prompts, monkeypatch):
    ids = torch.cat([prompts(1)[0], torch.full((4,), MASK)])
    for params, longest, words in (
        (PARAMS, 3, "longest is 3, and the text has 4 masks"),
        (PARAMS, 500, "507 tokens exceed the model's 128: lower longest"),
        (SamplingParams(max_new_tokens=0, threshold=0.9, forbid_mask=True), 8, "threshold is set, and variable"),
        (SamplingParams(max_new_tokens=0, alg="origin"), 8, "alg is 'origin'"),
    ):
        with pytest.raises(UserError, match=words):
            infill_variable_length(dreamon, ids, params=params, longest=longest)
    monkeypatch.setattr(dreamon.config, "expand_token_id", None)
    with pytest.raises(UserError, match="has no expand_token_id and eos_token_id: use a DreamOn"):
        infill_variable_length(dreamon, ids, params=PARAMS, longest=8)
