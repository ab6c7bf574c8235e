"""Trained weights multiplied in float8."""

import math

import pytest
import torch
from material import loss_after_60_steps
from torch.nn import functional as F

from dream_lightning import DreamConfig, DreamModel, DreamModule
from dream_lightning.adapters import LoraParams, train_in_float8
from dream_lightning.adapters.float8_linear import Float8TrainingLinear, to_float8

CPU = torch.device("cpu")


def model(**sizes):
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4} | sizes
    ids = {"mask_token_id": 1, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 0}
    return DreamModel(DreamConfig(vocab_size=64, num_key_value_heads=2, **sizes, **ids))


def in_float8(**sizes):
    changed = model(**sizes)
    train_in_float8(changed, CPU)
    return changed


def rounded(x):
    values, scales = to_float8(x)
    return values.float() * scales


@pytest.fixture
def layer():
    return in_float8().bfloat16().train().model.layers[0].self_attn.q_proj


def test_products_are_those_of_the_rounded_numbers(layer):
    x = torch.randn(3, 7, 64, generator=torch.Generator().manual_seed(1)).bfloat16().requires_grad_()
    out = layer(x)
    flat = x.detach().flatten(0, 1)
    expected = (rounded(flat) @ rounded(layer.weight).t()).bfloat16() + layer.bias
    assert torch.allclose(out.flatten(0, 1).float(), expected.float(), rtol=2**-7, atol=1e-6)
    exact = F.linear(x, layer.weight, layer.bias)
    assert 0.01 < (out - exact).float().norm() / exact.float().norm() < 0.05

    g = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).bfloat16()
    out.backward(g)
    g = g.flatten(0, 1)
    of_x = rounded(g) @ rounded(layer.weight.t()).t()
    assert torch.allclose(x.grad.flatten(0, 1).float(), of_x, rtol=2**-7, atol=1e-3)
    assert torch.equal(layer.weight.grad, g.t() @ flat)  # not rounded
    assert torch.allclose(layer.bias.grad.float(), g.float().sum(0), rtol=2**-6, atol=1e-2)


def test_parameters_evaluation_and_the_head_stay_as_they_are():
    plain, changed = model().eval(), model()
    before = dict(changed.named_parameters())
    train_in_float8(changed, CPU)
    assert {n: id(p) for n, p in changed.named_parameters()} == {n: id(p) for n, p in before.items()}
    assert changed.state_dict().keys() == plain.state_dict().keys()
    assert type(changed.lm_head) is torch.nn.Linear
    ids = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(0))
    assert torch.equal(plain(ids).logits, changed.eval()(ids).logits)
    assert not torch.equal(plain(ids).logits, changed.train()(ids).logits)


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_outputs_have_the_dtype_of_a_plain_layer(weights, autocast):
    x = torch.randn(2, 4, 64, dtype=weights)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        wanted, got = (m.to(weights).train().model.layers[0].mlp.gate_proj(x) for m in (model(), in_float8()))
    assert got.dtype == wanted.dtype and got.shape == wanted.shape


def test_compiled_it_gives_the_same():
    x = torch.randn(2, 16, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    results = []
    for compiled in (False, True):
        mlp = in_float8().bfloat16().train().model.layers[0].mlp
        if compiled:
            mlp.compile()
        inputs = x.clone().requires_grad_()
        out = mlp(inputs)
        out.backward(torch.ones_like(out))
        results.append((out, inputs.grad, mlp.up_proj.weight.grad))
    for a, b in zip(*results, strict=True):
        assert (a.float() - b.float()).norm() < 0.02 * a.float().norm()  # silu is not rounded in between


def test_nothing_of_a_rounded_weight_is_kept(layer):
    kept = []
    x = torch.randn(5, 64, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
    assert {(t.dtype, t.data_ptr()) for t in kept} <= {(torch.bfloat16, t.data_ptr()) for t in (x, layer.weight)}


def test_impossible_choices_are_refused():
    with pytest.raises(ValueError, match=r"q_proj is 40 × 40.*multiples of 16.*float8_products"):
        in_float8(hidden_size=40)
    with pytest.raises(ValueError, match=r"set model.quantize to float8 or nf4_float8"):
        DreamModule("somewhere", lora=LoraParams(), float8_products=True)


def test_it_trains_as_bfloat16_does():
    plain, float8 = (loss_after_60_steps(m.train(), adapters=False) for m in (model(), in_float8()))
    assert plain < 3.5 and float8 != plain
    assert math.log(64) - float8 == pytest.approx(math.log(64) - plain, rel=0.05)  # what both have learned


def test_the_module_trains_in_float8_by_option():
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2}
    module = DreamModule(new_model=sizes, tokenizer="bytes", float8_products=True)
    module.configure_model()
    assert sum(isinstance(layer, Float8TrainingLinear) for layer in module.model.modules()) == 7
