"""Bad input is named, with what to do about it."""

from types import SimpleNamespace

import pytest
import torch

from dream_lightning.sampling import SamplingParams
from dream_lightning.sampling.canvas import prepare

CONFIG = SimpleNamespace(mask_token_id=7, vocab_size=10, max_position_embeddings=32)
IDS = torch.tensor([[1, 2, 3, 4], [5, 6, 8, 9]])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("alg", "random"),
        ("steps", 0),
        ("steps", 2.5),
        ("steps", True),
        ("max_new_tokens", -1),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", float("nan")),
        ("top_k", 0),
        ("alg_temp", -1.0),
        ("eps", 0.0),
        ("eps", 1.0),
    ],
)
def test_params(field, value):
    with pytest.raises(ValueError, match=f"{field} is {value!r}"):
        SamplingParams(**{field: value})


def rows(*bits):
    return torch.tensor(bits)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_ids": IDS[0]}, r"shape \[4\], wanted \[B, P\]"),
        ({"input_ids": IDS[:, :0]}, "at least one row and token"),
        ({"input_ids": IDS.int()}, "wanted torch.int64"),
        ({"input_ids": IDS + 1}, "ids from 2 to 10, the vocabulary is 0 … 9"),
        ({"input_ids": IDS - 2}, "ids from -1 to 7"),
        ({"input_ids": IDS.masked_fill(IDS == 3, 7)}, "mask token 7 1 times: pass infill=True"),
        ({"params": SamplingParams(max_new_tokens=29)}, "4 prompt tokens and 29 new ones are 33"),
        ({"params": SamplingParams(max_new_tokens=0)}, "nothing to fill"),
        ({"attention_mask": rows([1, 1, 1], [1, 1, 1])}, r"shape \[2, 3\], wanted that of input_ids"),
        ({"attention_mask": rows([1, 1, 1, 1], [1, 1, 1, 0])}, "row 1 .* has a 0 after a 1"),
        ({"attention_mask": rows([0, 1, 0, 1], [1, 1, 1, 1])}, "row 0 .* has a 0 after a 1"),
        ({"attention_mask": rows([0, 1, 1, 1], [0, 0, 0, 0])}, "row 1 .* no real token"),
        ({"attention_mask": rows([0, 2, 1, 1], [1, 1, 1, 1])}, "other than 0 and 1"),
        ({"attention_mask": rows([0, 1, 1, 1], [1, 1, 1, 1]), "input_ids": IDS.masked_fill(IDS == 1, 7),
          "infill": True}, "padded with the mask token"),
        ({"sample_ids": torch.zeros(3, dtype=torch.int64)}, r"sample_ids is torch.int64 \[3\]"),
        ({"sample_ids": torch.zeros(2)}, "sample_ids is torch.float32"),
    ],
)  # fmt: skip
def test_prompts(change, message):
    arguments = {"input_ids": IDS, "attention_mask": None, "params": SamplingParams(max_new_tokens=8), **change}
    with pytest.raises(ValueError, match=message):
        prepare(CONFIG, **arguments)


def test_what_is_prepared():
    canvas = prepare(CONFIG, IDS, rows([0, 0, 1, 1], [1, 1, 1, 1]), SamplingParams(max_new_tokens=2))
    assert canvas.x.tolist() == [[1, 2, 3, 4, 7, 7], [5, 6, 8, 9, 7, 7]]
    assert canvas.real.tolist() == [[False, False, True, True, True, True], [True] * 6]
    assert canvas.positions.tolist() == [[1, 1, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5]]
    assert canvas.sample_ids.tolist() == [0, 1]
    assert canvas.padded
    assert not prepare(CONFIG, IDS, rows([1] * 4, [1] * 4), SamplingParams(max_new_tokens=2)).padded
