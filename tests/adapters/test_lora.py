"""LoRA: the same model at the start, only adapters train, merged equals unmerged, official PEFT reads the folder."""

import json
from dataclasses import replace

import pytest
import torch
from material import random_dream
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from dream_lightning.adapters import (
    LoraParams,
    adapter_state,
    add_lora,
    load_adapter_state,
    merge_lora,
    read_peft_folder,
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


def peft_folder(path, **options):
    """What PEFT saves after some training, with `task_type` as many set it, and the logits with it."""
    torch.manual_seed(0)
    model = get_peft_model(base(), LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]} | options))
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape, generator=seeded()))
    model.save_pretrained(path)
    wanted = logits(PeftModel.from_pretrained(base(), path).eval())
    change_config(path, task_type="CAUSAL_LM")  # which PEFT wraps only in models that generate
    return wanted


def change_config(path, **fields):
    file = path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


# The fields of adapter_config.json that PEFT 0.13 knows, of those that ours may have.
KNOWN = {"base_model_name_or_path", "bias", "peft_type", "r", "lora_alpha", "target_modules", "use_rslora"}
KNOWN |= {"rank_pattern", "alpha_pattern", "layers_to_transform", "layers_pattern"}


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "up_proj"]},
        {"target_modules": "all-linear"},
        {"target_modules": r".*layers\.1\.(self_attn\.k_proj|mlp\.up_proj)"},
        {"use_rslora": True, "r": 6},
        {"bias": "lora_only", "target_modules": ["q_proj", "o_proj"]},
        {
            "target_modules": ["q_proj", "up_proj", "v_proj"],
            "rank_pattern": {"up_proj": 2, r"layers\.0\.self_attn\.q_proj": 3},
            "alpha_pattern": {"v_proj": 5, r".*\.1\.mlp\.up_proj": 7},
        },
        {"layers_to_transform": [1], "layers_pattern": "layers"},
        {"target_modules": ["q_proj", "k_proj"], "exclude_modules": ["k_proj"]},
        {"fan_in_fan_out": True, "lora_dropout": 0.1, "init_lora_weights": "gaussian"},
    ],
    ids=str,
)
def test_folders_of_peft_give_its_logits_and_are_written_again(tmp_path, options):
    wanted = peft_folder(tmp_path / "theirs", **options)
    assert (wanted - logits(base())).abs().max() > 1e-2
    ours, params = base(), LoraParams(adapter=str(tmp_path / "theirs"))
    add_lora(ours, params)
    torch.testing.assert_close(logits(ours), wanted, rtol=1e-5, atol=1e-6)
    save_peft_folder(tmp_path / "ours", state_of(ours), params.config, {"name": "the base"})
    assert json.loads((tmp_path / "ours" / "adapter_config.json").read_text()).keys() <= KNOWN
    assert torch.equal(logits(PeftModel.from_pretrained(base(), tmp_path / "ours")), wanted)
    merge_lora(ours)
    torch.testing.assert_close(logits(ours), wanted, rtol=1e-5, atol=1e-6)
    assert ours.state_dict().keys() == base().state_dict().keys()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"use_dora": True}, "has use_dora: .*another network"),
        ({"modules_to_save": ["lm_head"]}, "has modules_to_save"),
        ({"bias": "all"}, "has bias all"),
        ({"lora_bias": True}, "has lora_bias"),
        ({"init_lora_weights": "pissa"}, "has init_lora_weights pissa, which changes the base"),
        ({"target_modules": ["embed_tokens"]}, "tensors are no adapters of linear layers"),
    ],
)
def test_folders_that_would_be_another_network_are_refused_by_field(tmp_path, options, words):
    peft_folder(tmp_path, **options)
    with pytest.raises(ValueError, match=words):
        LoraParams(adapter=str(tmp_path))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: change_config(f, r=8), "has rank 4, adapter_config.json says 8"),
        (lambda f: change_config(f, target_modules=["k_proj"]), "no target_modules for .*q_proj"),
        (lambda f: change_config(f, peft_type="IA3"), "peft_type is IA3, wanted LORA"),
        (lambda f: change_config(f, rank_pattern={"(": 3}), r"adapter_config.json is damaged"),
        (lambda f: change_config(f, lora_alpha="x"), "lora_alpha of .* is 'x'"),
        (lambda f: change_config(f, lora_alpha=None), "lora_alpha of .* is null"),
        (lambda f: change_config(f, bias=True), "has bias True"),
        (lambda f: (f / "adapter_config.json").write_text("[1]"), r"adapter_config.json is damaged"),
        (lambda f: (f / "adapter_config.json").unlink(), r"has no adapter_config.json"),
        (lambda f: (f / "adapter_model.safetensors").unlink(), r"has no adapter_model.safetensors"),
        (lambda f: (f / "adapter_model.safetensors").write_bytes(b"x" * 90), r"adapter_model.safetensors is damaged"),
    ],
)
def test_damaged_folders_are_refused_by_file(tmp_path, damage, words):
    peft_folder(tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match=words):
        LoraParams(adapter=str(tmp_path))


def test_adapters_of_larger_models_and_with_nan_are_refused(tmp_path):
    peft_folder(tmp_path)
    params = LoraParams(adapter=str(tmp_path))
    with pytest.raises(ValueError, match=r"of another model: DreamModel has no model.layers.1"):
        add_lora(random_dream(**SIZES, num_hidden_layers=1), params)
    state = load_file(tmp_path / "adapter_model.safetensors")
    save_file({name: tensor * torch.nan for name, tensor in state.items()}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="holds NaN"):
        add_lora(base(), params)


def test_the_folder_sets_the_other_options_and_says_so(tmp_path):
    peft_folder(tmp_path, target_modules=["o_proj"])
    with pytest.warns(UserWarning, match="rank is 5, but 4 in"):
        params = LoraParams(rank=5, adapter=str(tmp_path))
    assert (params.rank, params.alpha, params.target_names) == (4, 8, ["o_proj"])


def test_official_peft_loads_the_folder_and_writes_the_same_names(tmp_path):
    model = adapted()
    base().save_pretrained(tmp_path / "base")  # where PEFT looks for the base's configuration
    save_peft_folder(tmp_path / "ours", state_of(model), ALL.config, {"name": str(tmp_path / "base"), "hash": "a"})
    files = ["adapter_config.json", "adapter_model.safetensors"]
    assert sorted(f.name for f in (tmp_path / "ours").iterdir()) == files
    official = PeftModel.from_pretrained(base(), tmp_path / "ours")
    assert official.peft_config["default"].base_model_name_or_path == str(tmp_path / "base")
    assert torch.equal(logits(official), logits(model))
    official.save_pretrained(tmp_path / "theirs")
    ours, theirs = (load_file(tmp_path / f / files[1]) for f in ("ours", "theirs"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)
    assert read_peft_folder(tmp_path / "ours").base == {"name": str(tmp_path / "base"), "hash": "a"}


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
        ({"rank": 0}, "rank is 0"), ({"rank": 2.5}, "rank is 2.5"), ({"alpha": 0}, "alpha is 0"),
        ({"alpha": float("nan")}, "alpha is nan"), ({"targets": 3}, "targets is 3"),
        ({"targets": []}, r"targets is \[\]"), ({"targets": "q_proj"}, "wanted all-linear, or a list"),
        ({"targets": ["q_proj", "lm_head"]}, "lm_head"),
    ],
)  # fmt: skip
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
