"""Equal to the authors' numbers, at every position of every step."""

import json
from contextlib import nullcontext

import pytest
import torch
from safetensors.torch import load_file

from dream_lightning.kernels.fused_projections import fuse_weights_, fused_projections
from dream_lightning.model import DreamModel
from dream_lightning.sampling import SamplingParams, diffusion_generate
from dream_lightning.sampling.token_sampling import choose_tokens, token_probabilities

RUNS = [
    f"generate.{alg}.steps{steps}.{padding}"
    for alg in ("maskgit_plus", "topk_margin", "entropy")
    for steps in (5, 16, 32)
    for padding in ("plain", "leftpad")
]


@pytest.fixture(scope="module")
def golden(shared):
    return load_file(shared("golden/dream-tiny") / "golden.safetensors")


@pytest.fixture(scope="module")
def model(shared):
    return DreamModel.from_pretrained(shared("golden/dream-tiny")).float()


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", RUNS)
def test_generation_equals_the_authors(model, golden, shared, name, fused):
    run = json.loads((shared("golden/dream-tiny") / "golden.json").read_text())["generate"][name]
    prompt, attention_mask = golden["generate.prompt"], None
    if run.pop("leftpad"):
        prompt, attention_mask = golden["generate.prompt_leftpad"], golden["generate.attention_mask_leftpad"]

    params = SamplingParams(**run)
    if fused:  # as compiled models compute
        fuse_weights_(model.model)
    with fused_projections(model.model, prompt.numel()) if fused else nullcontext():
        out = diffusion_generate(model, prompt, attention_mask, params=params, return_history=True)

    assert torch.equal(out.history, golden[f"{name}.history"])
    assert torch.equal(out.sequences, golden[f"{name}.sequences"])


def test_the_checkpoints_own_top_k_is_the_default(model, golden):
    """transformers 4.46 writes `top_k: 50` into every config.json and the authors' code takes it from there."""
    assert model.config.default_top_k == 50
    params = SamplingParams(max_new_tokens=16, steps=5, alg="entropy", top_k=model.config.vocab_size)
    out = diffusion_generate(model, golden["generate.prompt"], params=params)
    assert not torch.equal(out.sequences, golden["generate.entropy.steps5.plain.sequences"])


@pytest.mark.parametrize(("name", "options"), [("top_p_0.9", {"top_p": 0.9}), ("top_k_7", {"top_k": 7})])
def test_filters_equal_the_authors(golden, name, options):
    probs = token_probabilities(golden["filter.logits"], SamplingParams(**options))
    expected = golden[f"filter.{name}.probs"]
    assert torch.equal(probs > 0, expected > 0)
    torch.testing.assert_close(probs, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("alg", ["maskgit_plus", "topk_margin", "entropy"])
def test_confidences_equal_the_authors(golden, alg):
    tokens, confidence = choose_tokens(golden["filter.logits"], None, SamplingParams(alg=alg))
    assert torch.equal(tokens, golden[f"confidence.{alg}.x0"])
    torch.testing.assert_close(confidence, golden[f"confidence.{alg}"], rtol=1e-6, atol=1e-7)
