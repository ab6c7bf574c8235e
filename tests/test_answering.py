"""Gaps in a text."""

import pytest
import torch

from dream_lightning import answering
from dream_lightning.answering import complete
from dream_lightning.model import load_tokenizer
from dream_lightning.model_factory import random_model
from dream_lightning.sampling import SamplingParams, diffusion_generate

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("bytes")


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    return random_model({**SIZES, "initializer_range": 0.4, "max_position_embeddings": 128}, tokenizer).eval()


def test_only_the_gaps_are_filled(model, tokenizer, monkeypatch):
    filled = []
    decode = tokenizer.decode
    monkeypatch.setattr(type(tokenizer), "decode", lambda self, ids, **k: (filled.append(ids), decode(ids, **k))[1])
    complete(model, tokenizer, "The … is <|mask|>… blue.", tokens_per_gap=3)
    ids = filled[-1].tolist()
    plain = [tokenizer.encode(part, split_special_tokens=True) for part in ("The ", " is <|mask|>", " blue.")]
    assert ids[:4] == plain[0] and ids[7 : 7 + len(plain[1])] == plain[1] and ids[-6:] == plain[2]
    gaps = ids[4:7] + ids[7 + len(plain[1]) : -6]
    assert len(gaps) == 6 and tokenizer.mask_token_id not in gaps and tokenizer.eos_token_id not in gaps


def test_without_params_a_step_fills_one_token(model, tokenizer, monkeypatch):
    filled = []

    def generate(*arguments, **options):
        out = diffusion_generate(*arguments, **options)
        filled.extend(step for step in out.filled_at[0].tolist() if step >= 0)
        return out

    monkeypatch.setattr(answering, "diffusion_generate", generate)
    complete(model, tokenizer, "The … is …", tokens_per_gap=3)
    assert sorted(filled) == [0, 1, 2, 3, 4, 5]


def test_the_text_after_a_gap_changes_the_filling(model, tokenizer):
    texts = {complete(model, tokenizer, f"The … is {end}", tokens_per_gap=6)[:10] for end in ("blue.", "wide?", "Ω")}
    assert len(texts) > 1
    a, b = (complete(model, tokenizer, "a … b", params=p) for p in (None, SamplingParams(steps=1, forbid_mask=True)))
    assert a.startswith("a ") and a.endswith(" b") and a != b


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": "no gap"}, "the text has no '…'"),
        ({"marker": ""}, "the text has no ''"),
        ({"tokens_per_gap": 0}, "tokens_per_gap is 0"),
        ({"params": SamplingParams(stop_at_eos=True, forbid_mask=True)}, "infill=True with stop_at_eos"),
    ],
)
def test_refusals(model, tokenizer, change, message):
    with pytest.raises(ValueError, match=message):
        complete(model, tokenizer, **{"text": "a … b", **change})
