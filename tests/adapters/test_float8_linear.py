"""Trained weights multiplied in float8."""

import lightning as L
import pytest
import torch
from material import fit_on, random_dream
from torch.nn import functional as F

from dream_lightning import DreamModule
from dream_lightning.adapters import LoraParams, train_in_float8
from dream_lightning.adapters.float8_linear import Float8TrainingLinear, to_float8

CPU = torch.device("cpu")


def in_float8(**sizes):
    model = random_dream(**sizes)
    train_in_float8(model, CPU)
    return model


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

    g = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).bfloat16()
    out.backward(g)
    g = g.flatten(0, 1)
    of_x = rounded(g) @ rounded(layer.weight.t()).t()
    assert torch.allclose(x.grad.flatten(0, 1).float(), of_x, rtol=2**-7, atol=1e-3)
    assert torch.equal(layer.weight.grad, g.t() @ flat)  # not rounded
    assert torch.allclose(layer.bias.grad.float(), g.float().sum(0), rtol=2**-6, atol=1e-2)


def test_the_error_is_that_of_float8(layer):
    x = torch.randn(256, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    exact = F.linear(x.float(), layer.weight.float())
    assert 0.01 < (layer(x).float() - layer.bias.float() - exact).norm() / exact.norm() < 0.05


def test_parameters_evaluation_and_the_head_stay_as_they_are():
    plain, changed = random_dream().eval(), random_dream()
    before = {n: id(p) for n, p in changed.named_parameters()}
    train_in_float8(changed, CPU)
    assert {n: id(p) for n, p in changed.named_parameters()} == before
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
        wanted, got = (m.to(weights).train().model.layers[0].mlp.gate_proj(x) for m in (random_dream(), in_float8()))
    assert got.dtype == wanted.dtype and got.shape == wanted.shape


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_compiled_it_gives_the_same(device):
    generator, results = torch.Generator().manual_seed(0), []
    x = torch.randn(2, 16, 64, generator=generator).bfloat16().to(device)
    for compiled in (False, True):
        mlp = in_float8().bfloat16().train().model.layers[0].mlp.to(device)
        if compiled:
            mlp.compile(fullgraph=True)
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
    with pytest.raises(ValueError, match=r"q_proj is 40 × 40.*multiples of 16"):
        in_float8(hidden_size=40)
    with pytest.raises(ValueError, match=r"set model.quantize to float8"):
        DreamModule("somewhere", lora=LoraParams(), float8_products=True)


class Losses(L.Callback):
    """Training losses of all steps."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, *_):
        self.seen.append(trainer.callback_metrics["train/loss"].item())


def test_it_trains_as_bfloat16_does(sums):
    losses = []
    for float8 in (False, True):
        L.seed_everything(0, verbose=False)
        module = DreamModule(
            new_model={"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2},
            tokenizer="bytes",
            weighting="none",
            optimizer=lambda groups: torch.optim.AdamW(groups, lr=3e-3),
            lr_schedule="constant_with_warmup",
            float8_products=float8,
        )
        recorder = Losses()
        fit_on(sums, module, batch_size=8, max_steps=40, gradient_clip_val=1.0, callbacks=[recorder])
        assert sum(isinstance(m, Float8TrainingLinear) for m in module.modules()) == 14 * float8
        losses.append(torch.tensor(recorder.seen))
    plain, float8 = losses
    assert not torch.equal(plain, float8)
    assert float8[-10:].mean() < 0.8 * float8[:5].mean()
    # The training loss is computed in float8 too, and falls steeply here: a little behind is far behind.
    assert (float8[-10:].mean() / plain[-10:].mean() - 1).abs() < 0.05
