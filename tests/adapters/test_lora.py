"""LoRA: the same model at the start, only adapters train, merged equals unmerged, official PEFT reads the folder."""

import json
from dataclasses import replace

import pytest
import torch
from material import random_dream
from peft import PeftModel
from safetensors.torch import load_file

from dream_lightning.adapters import (
    LoraParams,
    adapter_state,
    add_lora,
    load_adapter_state,
    merge_lora,
    save_peft_folder,
    trainable_summary,
)
from dream_lightning.diffusion.denoiser import features
from dream_lightning.model import DreamConfig, DreamModel

SIZES = {"vocab_size": 96, "hidden_size": 48, "intermediate_size": 80, "num_attention_heads": 6}
IDS = torch.arange(36).reshape(2, 18) * 7 % 90
ALL = LoraParams(rank=4, alpha=8, targets="all-linear")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def base(dtype=torch.float32) -> DreamModel:
    return random_dream(**SIZES).to(dtype).eval()


def seeded(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def adapted(params: LoraParams = ALL, dtype=torch.float32) -> DreamModel:
    """As after some training: no adapter is zero any more."""
    model, generator = base(dtype), seeded(2)
    add_lora(model, params, generator=seeded())
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return model


def state_of(model: DreamModel) -> dict[str, torch.Tensor]:
    return adapter_state(model.state_dict())


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(IDS).logits


@pytest.mark.parametrize(
    ("targets", "summary"),
    [
        (["q_proj", "v_proj"], "5,046,272 of 7,620,662,784 parameters train (0.0662 %)"),
        ("all-linear", "40,370,176 of 7,655,986,688 parameters train (0.5273 %)"),
    ],
)
def test_trainable_parameters_of_dream_7b(targets, summary):
    with torch.device("meta"):
        model = DreamModel(DreamConfig())
        add_lora(model, LoraParams(rank=16, targets=targets))
    assert trainable_summary(model) == summary


@DTYPES
def test_the_start_equals_the_base_bit_for_bit(dtype):
    model = base(dtype)
    before = logits(model)
    add_lora(model, ALL, generator=seeded())
    assert not any(module.training for module in model.modules())
    assert torch.equal(logits(model), before)


def test_the_generator_alone_decides_the_float32_adapters():
    """Not the dtype of the base, nor torch's own random numbers, nor whether the base is on the meta device."""
    models = [base(torch.float32), base(torch.bfloat16), base().to("meta"), base()]
    for seed, model in zip((1, 1, 1, 2), models, strict=True):
        torch.manual_seed(len(str(model.device)))
        add_lora(model, ALL, generator=seeded(seed), device=torch.device("cpu"))
    first, *same, other = (state_of(model) for model in models)
    assert models[1].lm_head.weight.dtype == torch.bfloat16 and models[2].lm_head.weight.is_meta
    for name, tensor in first.items():
        assert tensor.dtype == torch.float32
        assert all(torch.equal(tensor, state[name]) for state in same)
        assert torch.equal(tensor, other[name]) == ("lora_B" in name)


@DTYPES
def test_gradients_reach_every_adapter_under_checkpointing_and_nothing_else(dtype):
    model = adapted(dtype=dtype).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    where = torch.rand(IDS.shape, generator=seeded()) < 0.5
    model.lm_head(features(model, IDS, where)).float().square().sum().backward()
    with_gradient = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert with_gradient == {n for n, _ in model.named_parameters() if ".lora_" in n}
    assert len(with_gradient) == 2 * 7 * 2


def test_merged_equals_unmerged():
    model = adapted()
    before, plain = logits(model), logits(base())
    merge_lora(model)
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-5)
    assert (before - plain).abs().max() > 1e-2  # the adapters did something
    assert model.state_dict().keys() == base().state_dict().keys()


def test_merging_into_bfloat16_rounds_once():
    model, exact = adapted(dtype=torch.bfloat16), base(torch.bfloat16).float()
    add_lora(exact, ALL)
    load_adapter_state(exact, state_of(model))
    merge_lora(model)
    merge_lora(exact)
    for name, tensor in exact.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor.to(torch.bfloat16)), name


@pytest.mark.parametrize("change", [{"rank": 3}, {"alpha": 16}, {"targets": ["q_proj"]}], ids=str)
def test_every_option_changes_the_result(change):
    assert not torch.allclose(logits(adapted(replace(ALL, **change))), logits(adapted()), atol=1e-3)


def test_adapters_work_under_autocast():
    model = adapted(dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = logits(model)
    torch.testing.assert_close(mixed.float(), logits(model).float(), rtol=0.1, atol=0.05)


def test_official_peft_loads_the_folder_and_writes_the_same_names(tmp_path):
    model = adapted()
    base().save_pretrained(tmp_path / "base")  # where PEFT looks for the base's configuration
    save_peft_folder(tmp_path / "ours", state_of(model), ALL, str(tmp_path / "base"))
    files = ["adapter_config.json", "adapter_model.safetensors"]
    assert sorted(f.name for f in (tmp_path / "ours").iterdir()) == files
    official = PeftModel.from_pretrained(base(), tmp_path / "ours")
    assert official.peft_config["default"].base_model_name_or_path == str(tmp_path / "base")
    assert torch.equal(logits(official), logits(model))
    official.save_pretrained(tmp_path / "theirs")
    ours, theirs = (load_file(tmp_path / f / files[1]) for f in ("ours", "theirs"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)
    ours, theirs = (json.loads((tmp_path / f / files[0]).read_text()) for f in ("ours", "theirs"))
    assert ours.keys() <= theirs.keys()


@pytest.mark.parametrize("change", [{"rank": 8}, {"targets": ["q_proj"]}], ids=str)
def test_other_adapters_are_refused(change):
    model = adapted(replace(ALL, **change))
    before = {name: tensor.clone() for name, tensor in state_of(model).items()}
    with pytest.raises(ValueError, match="do not fit the model's adapters"):
        load_adapter_state(model, state_of(adapted()))
    assert all(torch.equal(before[name], tensor) for name, tensor in state_of(model).items())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rank": 0}, "rank is 0"),
        ({"rank": 2.5}, "rank is 2.5"),
        ({"alpha": 0}, "alpha is 0"),
        ({"targets": []}, r"targets is \[\]"),
        ({"targets": "q_proj"}, "wanted all-linear, or a list"),
        ({"targets": ["q_proj", "lm_head"]}, "lm_head"),
    ],
)
def test_params_out_of_their_range_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        LoraParams(**change)


def test_models_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="Sequential has no v_proj: take them out"):
        add_lora(torch.nn.Sequential(torch.nn.ModuleDict({"q_proj": torch.nn.Linear(2, 2)})), LoraParams())
    with pytest.raises(ValueError, match="already has adapters"):
        add_lora(adapted(), ALL)
    with pytest.raises(ValueError, match="no adapters to merge"):
        merge_lora(base())
