"""A frozen base in 8-bit floats: near the bfloat16 one, gradients included, and it learns as well."""

import pytest
import torch
from material import loss_after_60_steps
from torch import nn

from dream_lightning.adapters.float8 import Float8Linear, load_float8, to_float8
from dream_lightning.adapters.lora import LoraParams, add_lora, merge_lora
from dream_lightning.model import DreamConfig, DreamModel
from dream_lightning.model.loading import weight_files

SIZES = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
HEADS = {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "mask_token_id": 3,
    "pad_token_id": 0,
    "eos_token_id": 0,
    "bos_token_id": 1,
}


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("base")
    DreamModel(DreamConfig(**SIZES, **HEADS)).to(torch.bfloat16).save_pretrained(folder)
    return folder


def loaded(folder) -> DreamModel:
    with torch.device("meta"):
        model = DreamModel(DreamConfig.from_pretrained(folder))
    load_float8(model, weight_files(folder))
    return model


def test_every_row_uses_the_whole_range_and_one_outlier_spoils_one_row_only():
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    x[2, 7] = 1e4
    q, scale = to_float8(x)
    assert (q.float().abs().amax(1) == 448).all()
    errors = ((q.float() * scale - x).norm(dim=1) / x.norm(dim=1)).tolist()
    assert max(errors[:2] + errors[3:]) < 0.03


def test_a_layer_is_near_its_original_and_so_is_its_gradient():
    torch.manual_seed(0)
    linear = nn.Linear(64, 96).to(torch.bfloat16)
    layer = Float8Linear(64, 96, bias=True)
    layer.fill(linear.weight)
    layer.bias = nn.Parameter(linear.bias.data, requires_grad=False)
    x = torch.randn(3, 50, 64, dtype=torch.bfloat16, requires_grad=True)
    y = torch.randn(3, 50, 64, dtype=torch.bfloat16).copy_(x.detach()).requires_grad_()
    g = torch.randn(3, 50, 96, dtype=torch.bfloat16)
    layer(x).backward(g)
    linear(y).backward(g)
    assert relative(layer(x).float(), linear(y).float()) < 0.05
    assert relative(x.grad.float(), y.grad.float()) < 0.05
    assert layer.weight.grad is None


def test_a_base_is_loaded_and_only_adapters_train(folder):
    model, plain = loaded(folder), DreamModel.from_pretrained(folder)
    add_lora(model, LoraParams(rank=4, targets="all-linear"))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    ids = torch.randint(0, 64, (2, 24))
    logits = model(ids).logits
    assert relative(logits.float(), plain(ids).logits.float()) < 0.1
    logits.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for n, p in model.named_parameters() if "lora_B" in n)


def test_adapters_on_it_learn_like_those_on_the_bfloat16_base(folder):
    """Loss of a next-value task after 60 steps, within 3 % of the bfloat16 base's."""
    losses = [loss_after_60_steps(model) for model in (loaded(folder), DreamModel.from_pretrained(folder))]
    assert losses[1] < 3.5  # of ln 64 = 4.16: it has learnt something
    assert losses[0] == pytest.approx(losses[1], rel=0.03)


def test_adapters_are_not_merged_into_it(folder):
    model = loaded(folder)
    add_lora(model, LoraParams(rank=4))
    with pytest.raises(ValueError, match="load the bfloat16 checkpoint"):
        merge_lora(model)


def test_sizes_that_float8_has_not_are_refused(tmp_path):
    DreamModel(DreamConfig(**SIZES | {"intermediate_size": 120}, **HEADS)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="multiples of 16"):
        loaded(tmp_path)
