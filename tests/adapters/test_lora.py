"""LoRA: the same model at the start, only adapters train, merged equals unmerged, official PEFT reads the folder."""

import json
from dataclasses import replace

import pytest
import torch
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

SIZES = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "mask_token_id": 90,
    "pad_token_id": 91,
    "bos_token_id": 91,
    "eos_token_id": 91,
    "max_position_embeddings": 512,
}
IDS = torch.arange(36).reshape(2, 18) * 7 % 90
ALL = LoraParams(rank=4, alpha=8, targets="all-linear")
KINDS = [ALL, replace(ALL, rslora=True), replace(ALL, dora=True)]
KIND_NAMES = ["lora", "rslora", "dora"]


def base(dtype=torch.float32) -> DreamModel:
    torch.manual_seed(0)
    return DreamModel(DreamConfig(**SIZES)).to(dtype).eval()


def seeded(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def perturb(model: DreamModel) -> DreamModel:
    """As after some training: no adapter is zero any more."""
    generator = seeded(2)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return model


def adapted(params: LoraParams = ALL, dtype=torch.float32) -> DreamModel:
    model = base(dtype)
    add_lora(model, params, generator=seeded())
    return perturb(model)


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(IDS).logits


@pytest.mark.parametrize(
    ("targets", "trainable"),
    [(["q_proj", "v_proj"], 5_046_272), ("all-linear", 40_370_176)],
)
def test_trainable_parameters_of_dream_7b(targets, trainable):
    with torch.device("meta"):
        model = DreamModel(DreamConfig())
        add_lora(model, LoraParams(rank=16, targets=targets))
    count = trainable_summary(model)
    assert (count.trainable, count.total) == (trainable, 7_615_616_512 + trainable)
    if trainable == 5_046_272:
        assert str(count) == "5,046,272 of 7,620,662,784 parameters train (0.0662 %)"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_start_equals_the_base_bit_for_bit(dtype):
    model = base(dtype)
    before = logits(model)
    add_lora(model, ALL, generator=seeded())
    assert type(model) is DreamModel and not model.training
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dora_starts_at_the_base(dtype):
    model = base(dtype)
    before = logits(model)
    add_lora(model, replace(ALL, dora=True), generator=seeded())
    torch.testing.assert_close(logits(model), before)


def test_adapters_are_float32_and_the_same_for_every_base_dtype():
    models = [base(torch.float32), base(torch.bfloat16)]
    for model in models:
        add_lora(model, ALL, generator=seeded())
    first, second = (adapter_state(model) for model in models)
    assert models[1].lm_head.weight.dtype == torch.bfloat16
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype == torch.float32
        assert torch.equal(tensor, second[name])


def test_the_generator_decides_the_adapters():
    models = [base(), base()]
    for seed, model in enumerate(models):
        add_lora(model, ALL, generator=seeded(seed))
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    assert not torch.equal(adapter_state(models[0])[name], adapter_state(models[1])[name])


@pytest.mark.parametrize("params", KINDS, ids=KIND_NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_reach_every_adapter_under_checkpointing_and_nothing_else(params, dtype):
    model = base(dtype)
    add_lora(model, params, generator=seeded())
    perturb(model).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    where = torch.rand(IDS.shape, generator=seeded()) < 0.5
    model.lm_head(features(model, IDS, where)).float().square().sum().backward()
    kinds = 3 if params.dora else 2
    with_gradient = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert with_gradient == {n for n, _ in model.named_parameters() if ".lora_" in n}
    assert len(with_gradient) == kinds * 7 * SIZES["num_hidden_layers"]


def test_training_changes_only_adapters():
    model = base()
    add_lora(model, LoraParams(rank=4), generator=seeded())
    before = {n: p.clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    model(IDS).logits.square().sum().backward()
    optimizer.step()
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {n for n in before if ".lora_" in n}
    assert {n.split(".")[4] for n in changed} == {"q_proj", "v_proj"}


@pytest.mark.parametrize("params", KINDS, ids=KIND_NAMES)
def test_merged_equals_unmerged(params):
    model = adapted(params)
    before, plain = logits(model), logits(base())
    merge_lora(model)
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-5)
    assert (before - plain).abs().max() > 1e-2  # the adapters did something
    assert model.state_dict().keys() == base().state_dict().keys()


def test_merging_into_bfloat16_rounds_once():
    model, exact = adapted(dtype=torch.bfloat16), base(torch.bfloat16).float()
    add_lora(exact, ALL)
    load_adapter_state(exact, adapter_state(model))
    merge_lora(model)
    merge_lora(exact)
    for name, tensor in exact.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor.to(torch.bfloat16)), name


@pytest.mark.parametrize(
    "change",
    [{"rank": 3}, {"alpha": 16}, {"rslora": True}, {"dora": True}, {"targets": ["q_proj"]}],
    ids=lambda change: next(iter(change)),
)
def test_every_option_changes_the_result(change):
    assert not torch.allclose(logits(adapted(replace(ALL, **change))), logits(adapted()), atol=1e-3)


def test_dropout_is_for_training_only():
    model, with_dropout = adapted(), adapted(replace(ALL, dropout=0.5))
    assert torch.equal(logits(model), logits(with_dropout))
    assert not torch.allclose(logits(model), logits(with_dropout.train()), atol=1e-3)


def test_adapters_work_under_autocast():
    model = adapted(dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = logits(model)
    torch.testing.assert_close(mixed.float(), logits(model).float(), rtol=0.1, atol=0.05)


class TestFiles:
    @pytest.mark.parametrize("params", KINDS, ids=KIND_NAMES)
    def test_official_peft_loads_the_folder(self, params, tmp_path):
        model = adapted(params)
        save_peft_folder(model, tmp_path, "Dream-org/Dream-v0-Instruct-7B")
        config = json.loads((tmp_path / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == "Dream-org/Dream-v0-Instruct-7B"
        assert sorted(f.name for f in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
        official = PeftModel.from_pretrained(base(), tmp_path)
        assert torch.equal(logits(official), logits(model))

    @pytest.mark.parametrize("params", KINDS, ids=KIND_NAMES)
    def test_names_are_those_that_official_peft_writes(self, params, tmp_path):
        model = adapted(params)
        base().save_pretrained(tmp_path / "base")  # where PEFT looks for the base's configuration
        save_peft_folder(model, tmp_path / "ours", str(tmp_path / "base"))
        PeftModel.from_pretrained(base(), tmp_path / "ours").save_pretrained(tmp_path / "theirs")
        ours, theirs = (load_file(tmp_path / f / "adapter_model.safetensors") for f in ("ours", "theirs"))
        assert ours.keys() == theirs.keys() == adapter_state(model).keys()

    @pytest.mark.parametrize("params", KINDS, ids=KIND_NAMES)
    def test_state_round_trip(self, params):
        model, fresh = adapted(params), base()
        add_lora(fresh, params)
        load_adapter_state(fresh, adapter_state(model))
        assert torch.equal(logits(fresh), logits(model))

    def test_state_from_a_gathered_state_dict(self):
        model = adapted()
        gathered = {name: tensor + 1 for name, tensor in model.state_dict().items()}
        state = adapter_state(model, gathered)
        for name, tensor in adapter_state(model).items():
            assert torch.equal(state[name], tensor + 1)

    @pytest.mark.parametrize("change", [{"rank": 8}, {"targets": ["q_proj"]}, {"dora": True}])
    def test_other_adapters_are_refused(self, change):
        model = base()
        add_lora(model, replace(ALL, **change))
        before = adapter_state(model)
        with pytest.raises(ValueError, match="do not fit the model's adapters"):
            load_adapter_state(model, adapter_state(adapted()))
        assert all(torch.equal(before[name], tensor) for name, tensor in adapter_state(model).items())


class TestErrors:
    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"rank": 0}, "rank is 0"),
            ({"rank": 2.5}, "rank is 2.5"),
            ({"alpha": 0}, "alpha is 0"),
            ({"dropout": 1.0}, "dropout is 1.0"),
            ({"targets": []}, r"targets is \[\]"),
            ({"targets": "q_proj"}, "wanted all-linear, or a list"),
            ({"targets": ["q_proj", "lm_head"]}, "lm_head"),
        ],
    )
    def test_params_out_of_range(self, change, words):
        with pytest.raises(ValueError, match=words):
            LoraParams(**change)

    def test_a_model_without_the_target(self):
        with pytest.raises(ValueError, match="Sequential has no layers called v_proj: take them out"):
            add_lora(torch.nn.Sequential(torch.nn.ModuleDict({"q_proj": torch.nn.Linear(2, 2)})), LoraParams())

    def test_a_rank_that_no_change_can_have(self):
        layers = {"q_proj": torch.nn.Linear(8, 8), "v_proj": torch.nn.Linear(8, 4)}
        with pytest.raises(
            ValueError, match=r"rank is 5, and 0\.v_proj has 8 inputs and 4 outputs: .* more than rank 4"
        ):
            add_lora(torch.nn.Sequential(torch.nn.ModuleDict(layers)), LoraParams(rank=5))

    def test_adapters_twice(self):
        with pytest.raises(ValueError, match="already has adapters"):
            add_lora(adapted(), ALL)

    def test_merging_nothing(self):
        with pytest.raises(ValueError, match="no adapters to merge"):
            merge_lora(base())
