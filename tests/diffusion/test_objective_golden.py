"""Corruption, weights and losses equal to the authors' (golden.json names source, seed, dtype and device)."""

import pytest
import torch
from safetensors.torch import load_file

from dream_lightning.diffusion import corrupt, masked_nll_loss, reduce_nll, token_nll, token_weights
from dream_lightning.diffusion.denoiser import features, logits
from dream_lightning.model import DreamModel

MASK, EOS = 500, 499
WEIGHTS = [("original", None), ("linear", None), ("none", None), ("cart", 0.1), ("cart", 0.3), ("cart", 0.8)]


@pytest.fixture(scope="module")
def golden(shared):
    return load_file(shared("golden/dream-tiny/golden.safetensors"))


@pytest.fixture(scope="module")
def model(shared):
    return DreamModel.from_pretrained(shared("golden/dream-tiny")).eval()


@pytest.fixture(scope="module", params=["loss.", "loss.eos_as_one."])
def case(request, golden, model):
    """Our noised batch and token losses for one of the authors' cases."""
    prefix = request.param
    noised = corrupt(
        golden["loss.x_0"],
        golden["loss.maskable"].bool(),
        mask_token_id=MASK,
        t=golden["loss.t"],
        u=golden["loss.u"],
        eos_as_one=EOS if "eos" in prefix else None,
    )
    with torch.no_grad():
        h = features(model, noised.x_t, noised.is_masked)
        nll = token_nll(h, model.lm_head, golden["loss.x_0"][noised.is_masked], chunk=13)
    return prefix, noised, nll


def test_corruption(case, golden):
    prefix, noised, _ = case
    assert torch.equal(noised.is_masked, golden[prefix + "is_masked"].bool())
    assert torch.equal(noised.x_t, golden[prefix + "x_t"])


def test_token_nll(case, golden):
    prefix, noised, nll = case
    torch.testing.assert_close(nll, golden[prefix + "token_nll"][noised.is_masked], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("weighting", "p"), WEIGHTS)
def test_weights_and_losses(case, golden, weighting, p):
    prefix, noised, nll = case
    name = prefix + (weighting if p is None else f"cart_p{p}")
    weight = token_weights(noised.is_masked, noised.t, weighting=weighting, cart_p=p or 0.1)
    expected = golden[name + ".weight"]
    torch.testing.assert_close(weight[noised.is_masked], expected[noised.is_masked], rtol=1e-5, atol=1e-6)
    for suffix, gamma in ((".loss", 0.0), (".focal_gamma2.loss", 2.0)):
        terms = reduce_nll(nll, weight[noised.is_masked], normalizer="masked", focal_gamma=gamma)
        torch.testing.assert_close(terms.mean, golden[name + suffix], rtol=1e-5, atol=1e-5)


def test_loss_from_logits(golden, model):
    x_0, is_masked = golden["loss.x_0"], golden["loss.is_masked"].bool()
    with torch.no_grad():
        out = logits(model, golden["loss.x_t"], is_masked)
    weight = token_weights(is_masked, golden["loss.t"])
    terms = masked_nll_loss(out, x_0[is_masked], weight[is_masked], normalizer="masked")
    torch.testing.assert_close(terms.mean, golden["loss.original.loss"], rtol=1e-5, atol=1e-5)
    assert terms.count == is_masked.sum()
