"""Bad input is named, with what to do about it."""

import re
from types import SimpleNamespace

import pytest
import torch

from dream_lightning.sampling import SamplingParams
from dream_lightning.sampling.canvas import prepare

CONFIG = SimpleNamespace(mask_token_id=7, vocab_size=10, max_position_embeddings=32, eos_token_id=None)
ENDS = SimpleNamespace(**{**vars(CONFIG), "eos_token_id": 0})
IDS = torch.tensor([[1, 2, 3, 4], [5, 6, 8, 9]])


NAN, INF = float("nan"), float("inf")
WRONG = {
    "alg": ["random"],
    "steps": [0, 2.5, True],
    "max_new_tokens": [-1],
    "max_length": [0, 4.5],
    "temperature": [-0.1, NAN, INF],
    "top_p": [0.0, 1.1, NAN],
    "top_k": [0],
    "alg_temp": [-1.0],
    "eps": [0.0, 1.0],
    "seed": [None, 0.5],
    "forbid_mask": ["False"],
    "compile": [None],
    "banned_tokens": [5, (2.5,), (True,)],
    "threshold": [0.0, 1.5],
    "factor": [0.0, INF],
    "block_length": [0],
    "refresh_every": [0],
    "tokens_per_step": [0],
    "min_new_tokens": [-1],
}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in WRONG.items() for value in values])
def test_params(field, value):
    with pytest.raises(ValueError, match=re.escape(f"{field} is {value!r}")):
        SamplingParams(**{field: value})


BLOCKS = {"max_new_tokens": 32, "steps": 32, "block_length": 8, "forbid_mask": True}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_length": 7}, "block_length is 7 and max_new_tokens 32: set a multiple"),
        ({"max_new_tokens": 0}, "block_length is 8 and max_new_tokens 0"),
        ({"steps": 30}, "steps is 30 for 4 blocks: set a multiple of 4"),
        ({"forbid_mask": False}, "block_length is set and forbid_mask is False"),
        ({"cache": "both"}, "cache is 'both', it must be one of none, prefix, dual"),
        ({"cache": "dual", "block_length": None}, "cache is 'dual' without blocks: set block_length"),
        ({"fast_dllm_threshold": 0.9}, "fast_dllm_threshold is set without a KV cache"),
        ({"refresh_every": 4}, "refresh_every is 4 without a cache"),
        ({"threshold": 0.9, "factor": 1.0}, "threshold and factor are set"),
        ({"threshold": 0.9, "alg": "origin"}, "threshold is set and alg is 'origin'"),
        ({"threshold": 0.9, "alg_temp": 0.5}, "alg_temp is 0.5, but threshold draws no positions"),
        ({"tokens_per_step": 3, "steps": 8}, "tokens_per_step is 3 and steps 8: set at least 12"),
        ({"stop_at_eos": True, "forbid_mask": False, "block_length": None}, "stop_at_eos is set and forbid_mask"),
        ({"compile": True, "forbid_mask": False, "block_length": None}, "compile is set and forbid_mask"),
        ({"min_new_tokens": 33}, "min_new_tokens is 33, max_new_tokens only 32"),
    ],
)
def test_params_that_exclude_each_other(options, message):
    with pytest.raises(ValueError, match=message):
        SamplingParams(**{**BLOCKS, **options})


def rows(*bits):
    return torch.tensor(bits)


def params(**options):
    return SamplingParams(**{"max_new_tokens": 8, "steps": 8, "forbid_mask": True, **options})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_ids": IDS[0]}, r"shape \[4\], wanted \[B, P\]"),
        ({"input_ids": IDS[:, :0]}, "at least one row and token"),
        ({"input_ids": IDS.int()}, "wanted torch.int64"),
        ({"input_ids": IDS + 1}, "ids from 2 to 10, the vocabulary is 0 … 9"),
        ({"input_ids": IDS - 2}, "ids from -1 to 7"),
        ({"input_ids": IDS.masked_fill(IDS == 3, 7)}, "has 1 mask tokens: pass infill=True"),
        ({"params": params(max_new_tokens=29)}, "4 prompt tokens and 29 new ones exceed"),
        ({"params": params(max_new_tokens=0)}, "nothing to fill"),
        ({"attention_mask": rows([1, 1, 1], [1, 1, 1])}, r"shape \[2, 3\], wanted that of input_ids"),
        ({"attention_mask": rows([1, 1, 1, 1], [1, 1, 1, 0])}, "row 1 .* has a 0 after a 1"),
        ({"attention_mask": rows([0, 1, 0, 1], [1, 1, 1, 1])}, "row 0 .* has a 0 after a 1"),
        ({"attention_mask": rows([0, 1, 1, 1], [0, 0, 0, 0])}, "row 1 .* no real token"),
        ({"attention_mask": rows([0, 2, 1, 1], [1, 1, 1, 1])}, "other than 0 and 1"),
        ({"params": params(banned_tokens=[10])}, r"banned_tokens holds \[10\]"),
        ({"params": params(min_new_tokens=2)}, "config has no eos_token_id"),
        ({"params": params(max_length=4)}, "a prompt has 4 tokens and max_length is 4: raise it"),
        ({"params": params(max_length=9), "infill": True}, "infill=True with max_length"),
        ({"params": params(max_length=9)}, "max_length needs an eos_token_id in the model's config"),
        ({"params": params(max_length=33, max_new_tokens=40), "config": ENDS}, "tokens and 29 new ones exceed"),
        ({"params": params(block_length=4), "infill": True}, "infill=True with block_length"),
        ({"params": params(stop_at_eos=True), "infill": True}, "infill=True with stop_at_"),
        ({"sample_ids": torch.zeros(3, dtype=torch.int64)}, r"sample_ids is torch.int64 \[3\]"),
        ({"sample_ids": torch.zeros(2)}, "sample_ids is torch.float32"),
    ],
)  # fmt: skip
def test_prompts(change, message):
    arguments = {"config": CONFIG, "input_ids": IDS, "attention_mask": None, "params": params(), **change}
    with pytest.raises(ValueError, match=message):
        prepare(**arguments)


@pytest.mark.parametrize("max_length", [None, 1, 20, 32, 33, 99])
def test_the_longest_prompt_is_the_longest_that_is_taken(max_length):
    sampling = params(max_length=max_length)

    def fits(length):
        return sampling.room(length) > 0 and length + sampling.room(length) <= ENDS.max_position_embeddings

    assert sampling.longest_prompt(32) == max((length for length in range(1, 32) if fits(length)), default=0)


def test_canvas():
    canvas = prepare(CONFIG, IDS, rows([0, 0, 1, 1], [1, 1, 1, 1]), params(max_new_tokens=2))
    assert canvas.x.tolist() == [[1, 2, 3, 4, 7, 7], [5, 6, 8, 9, 7, 7]]
    assert canvas.real.tolist() == [[False, False, True, True, True, True], [True] * 6]
    assert canvas.positions.tolist() == [[1, 1, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5]]
    assert canvas.sample_ids.tolist() == [0, 1]
    assert canvas.padded
    assert not prepare(CONFIG, IDS, rows([1] * 4, [1] * 4), params(max_new_tokens=2)).padded
