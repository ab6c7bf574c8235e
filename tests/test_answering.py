"""Gaps in a text."""

import pytest
import torch
from material import SIZES

from dream_lightning import answering
from dream_lightning.answering import complete
from dream_lightning.model import load_tokenizer
from dream_lightning.model_factory import random_model
from dream_lightning.sampling import SamplingParams

TOKENIZER = load_tokenizer("bytes")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return random_model({**SIZES, "initializer_range": 0.4}, TOKENIZER).eval()


def test_only_the_gaps_are_filled_one_token_a_step(model, monkeypatch, calls):
    texts, forwards = [], calls(model)
    decode = type(TOKENIZER).decode
    monkeypatch.setattr(type(TOKENIZER), "decode", lambda self, ids: texts.append(ids.tolist()) or decode(self, ids))
    complete(model, TOKENIZER, "The … is <|mask|>… blue.", tokens_per_gap=3)
    a, b, c = (TOKENIZER.encode(part, split_special_tokens=True) for part in ("The ", " is <|mask|>", " blue."))
    first, second = texts[0][4:7], texts[0][-9:-6]
    assert texts[0] == [*a, *first, *b, *second, *c] and len(forwards) == 6
    assert not {TOKENIZER.mask_token_id, TOKENIZER.eos_token_id} & {*first, *second}


def test_what_follows_a_gap_and_the_params_change_the_filling(model):
    ends = {complete(model, TOKENIZER, f"The … is {end}", tokens_per_gap=6)[:10] for end in ("blue.", "wide?", "Ω")}
    assert len(ends) > 1
    a, b = (complete(model, TOKENIZER, "a … b", params=p) for p in (None, SamplingParams(steps=1, forbid_mask=True)))
    assert a.startswith("a ") and a.endswith(" b") and a != b


def test_gaps_of_a_dreamon_grow_inside_its_prompt(model, monkeypatch):
    """Between bos and eos, which are not part of the text."""
    asked = []
    fill = answering.infill_variable_length
    monkeypatch.setattr(
        answering, "infill_variable_length", lambda *a, **k: asked.append(a[1].tolist()) or fill(*a, **k)
    )
    monkeypatch.setattr(model.config, "expand_token_id", TOKENIZER.convert_tokens_to_ids("<think>"))
    text = complete(model, TOKENIZER, "a … b", tokens_per_gap=3, longest=9)
    assert text.startswith("a ") and text.endswith(" b") and "<|endoftext|>" not in text
    a, b = (TOKENIZER.encode(part) for part in ("a ", " b"))
    mask = TOKENIZER.mask_token_id
    assert asked == [[TOKENIZER.bos_token_id, *a, mask, mask, mask, *b, TOKENIZER.eos_token_id]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": "no gap"}, "the text has no '…'"),
        ({"marker": ""}, "the text has no ''"),
        ({"tokens_per_gap": 0}, "tokens_per_gap is 0"),
        ({"params": SamplingParams(stop_at_eos=True, forbid_mask=True)}, "infill=True with stop_at_eos"),
    ],
)
def test_refusals(model, change, message):
    with pytest.raises(ValueError, match=message):
        complete(model, TOKENIZER, **{"text": "a … b", **change})
