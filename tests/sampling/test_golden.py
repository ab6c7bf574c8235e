"""Equal to the authors' numbers, at every position of every step."""

import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dream_lightning.diffusion.noise import uniform
from dream_lightning.kernels.fused_projections import fuse_weights_, fused_projections
from dream_lightning.model import DreamConfig, DreamModel
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
    """The golden folder's config.json has `top_k: 50`, and the authors' code takes it from there."""
    assert model.config.default_top_k == 50
    params = SamplingParams(max_new_tokens=16, steps=5, alg="entropy", top_k=model.config.vocab_size)
    out = diffusion_generate(model, golden["generate.prompt"], params=params)
    assert not torch.equal(out.sequences, golden["generate.entropy.steps5.plain.sequences"])


def hashed(model, scale):
    """The model with a hash as weights, the same in every version of torch."""
    with torch.no_grad():
        for number, (name, p) in enumerate(sorted(model.named_parameters())):
            u = uniform(number, torch.arange(p.numel())).view(p.shape)
            p.copy_(u + 0.5 if "norm" in name else scale * (u - 0.5))
    return model.eval()


def saved(name):
    return json.loads(Path(__file__).with_name(f"golden_{name}.json").read_text())


@pytest.mark.parametrize("name", [key for key in saved("fast_dllm") if key[0].isdigit()])
def test_fast_dllm_threshold_gives_the_tokens_of_fast_dllm(shared, name):
    seed, cache, threshold = name.split()
    model = hashed(DreamModel(DreamConfig.from_pretrained(shared("golden/dream-tiny"))).float(), 0.5)
    prompt = (uniform(int(seed), torch.arange(9)) * 490).long()[None]
    options = {"max_new_tokens": 24, "steps": 24, "alg": "maskgit_plus", "block_length": 8, "cache": cache}
    options |= {"forbid_mask": True, "top_k": model.config.vocab_size}
    for rule in ("fast_dllm_threshold", "threshold"):
        params = SamplingParams(**options, **{rule: float(threshold)})
        tokens = diffusion_generate(model, prompt, params=params).sequences[0, 9:].tolist()
        assert (tokens == saved("fast_dllm")[name]) == (rule == "fast_dllm_threshold")


@pytest.fixture(scope="module")
def official(shared):
    """A Dream with the official config.json, of other sizes."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = json.loads((shared("data/dream-v0-instruct-7b") / "config.json").read_text())
    return hashed(DreamModel(DreamConfig.from_dict(config | sizes | {"num_key_value_heads": 1})).float(), 2)


@pytest.mark.parametrize("alg", ["entropy", "maskgit_plus", "topk_margin"])
@pytest.mark.parametrize(("script", "top_k"), [("eval", None), ("demo", 50)])
def test_the_official_config_gives_the_authors_tokens(official, alg, script, top_k):
    """Where config.json has no `top_k`, the authors' demo scripts filter with 50 and their eval.py does not filter."""
    expected = saved("top_k")[alg]
    prompt = (uniform(99, torch.arange(16)) * 150_000).long().view(2, 8)
    params = SamplingParams(max_new_tokens=24, steps=12, alg=alg, top_k=top_k)
    assert diffusion_generate(official, prompt, params=params).sequences[:, 8:].tolist() == expected[script]
    assert expected["eval"] != expected["demo"]


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
