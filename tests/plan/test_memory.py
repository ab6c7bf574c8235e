"""The plan against exact counts and against what was measured at 7B shapes on an H100 (docs/benchmarks.md)."""

from dataclasses import replace

import pytest
import torch

from dream_lightning.adapters import LoraParams, load_quantized
from dream_lightning.model import DreamConfig, DreamModel
from dream_lightning.model.loading import weight_files
from dream_lightning.plan import Setting, count_parameters, make_plan
from dream_lightning.plan.advice import changes, faster
from dream_lightning.plan.setting import NF4
from dream_lightning.training.optimizer import AdamW8bit

Q_V, ALL = LoraParams(targets=["q_proj", "v_proj"]), LoraParams(targets="all-linear")
QLORA = Setting(
    DreamConfig(), rows=4, length=2048, optimizer=torch.optim.AdamW, dtype=torch.bfloat16, lora=Q_V, four_bit=True
)
FULL = replace(QLORA, lora=None, four_bit=False, dtype=torch.float32)


def paged_adamw_8bit(groups):
    return pytest.importorskip("bitsandbytes").optim.PagedAdamW8bit(groups)


def own_adamw_8bit(groups):
    return AdamW8bit(groups)


KEPT = {"checkpointed": False, "compiled": True, "accumulation": 8}


@pytest.mark.parametrize(
    ("change", "measured"),
    [
        ({"lora": None, "four_bit": False, "optimizer": paged_adamw_8bit, "head_chunk": 2048}, 32.7),
        (KEPT | {"lora": ALL, "four_bit": False}, 39.2),
        (KEPT | {"lora": ALL}, 30.2),
        (KEPT | {"rows": 1, "checkpointed": 25}, 6.55),
        (KEPT | {"lora": None, "four_bit": False, "rows": 2, "optimizer": own_adamw_8bit}, 56.6 + 14.2),
        ({"lora": ALL, "rows": 1, "length": 32768, "compiled": True}, 20.9),
        ({"rows": 1, "length": 8192, "compiled": True, "accumulation": 8}, 8.26),
        ({"lora": ALL, "four_bit": False, "rows": 1, "length": 8192, "compiled": True, "accumulation": 8}, 18.7),
    ],
)
def test_within_a_tenth_of_what_was_measured(change, measured):
    """GiB of torch.cuda.max_memory_allocated on one H100. `benchmark_train.py` prints the plan beside each peak."""
    assert make_plan(replace(QLORA, **change)).peak_gib == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("memory", [16, 24, 30])
def test_as_few_layers_are_recomputed_as_fit(memory):
    shipped = replace(QLORA, rows=1, length=8192, compiled=True, accumulation=8)
    options, plan = faster(shipped, memory)
    count = plan.setting.recomputed
    assert 0 < count < 28 and options == f"--model.gradient_checkpointing={count}"
    one_less = make_plan(replace(shipped, checkpointed=count - 1))
    assert plan.needed_gib <= 0.95 * memory < one_less.needed_gib


def test_none_or_all_layers_are_recomputed():
    shipped = replace(QLORA, rows=1, length=8192, compiled=True, accumulation=8)
    options, plan = faster(shipped, 80)
    assert options == "--model.gradient_checkpointing=false" and plan.setting.recomputed == 0
    assert faster(plan.setting, 80) is None and faster(shipped, make_plan(shipped).needed_gib) is None


def test_parameters_of_the_7b():
    qlora, full = count_parameters(QLORA), count_parameters(replace(FULL, dtype=torch.bfloat16))
    assert (qlora.trainable, qlora.total) == (5_046_272, 7_620_662_784)
    assert full.total == full.trainable == 7_615_616_512
    assert full.weights == full.gradients == 15_231_233_024  # as the official index.json says
    assert count_parameters(FULL).weights == 2 * full.weights
    assert qlora.weights / 2**30 == pytest.approx(5.2, abs=0.03)


def test_bytes_of_packed_weights(tmp_path):
    """Against bitsandbytes' own tensors; its tables of codes, 1.1 kB a layer, are not counted."""
    pytest.importorskip("bitsandbytes")
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = DreamConfig(vocab_size=96, num_key_value_heads=4, mask_token_id=90, pad_token_id=91, **sizes)
    DreamModel(config).to(torch.bfloat16).save_pretrained(tmp_path)
    with torch.device("meta"):
        model = DreamModel(config)
    load_quantized(model, weight_files(tmp_path), kind="nf4")
    layer = model.model.layers[0].mlp.up_proj
    real = sum(t.nbytes for t in (layer.weight, layer.scale_codes, layer.superscales))
    assert real == layer.in_features * layer.out_features * NF4
    held = sum(p.nbytes for p in model.parameters())  # packed, without scales
    linear = sum(2 * p.numel() for p in model.parameters() if p.dtype == torch.uint8)
    planned = count_parameters(replace(QLORA, config=config, lora=None)).weights
    assert planned == held + linear * (NF4 - 0.5)


def test_states_of_adamw_8bit():
    plan = make_plan(replace(FULL, dtype=torch.bfloat16, optimizer=AdamW8bit))
    assert plan.optimizer.states == pytest.approx(4.03 * plan.parameters.total, rel=1e-2)  # and low-order bits, scales


def test_float32_masters_take_16_bytes_a_parameter_and_the_copies_that_autocast_caches():
    plan = make_plan(FULL)
    total, table = 7_615_616_512, 152_064 * 3_584
    at_head, step = plan.moments["forward, at the head"], plan.moments["optimiser step"]
    assert at_head.weights + at_head.gradients + at_head.optimizer == 16 * total
    assert at_head.copies == pytest.approx(2 * (total - table), rel=1e-4)  # everything but embeddings and norms
    assert step.temporaries == 4 * total  # the multi-tensor AdamW's root of the second moments
    fused = replace(FULL, optimizer=lambda groups: torch.optim.AdamW(groups, fused=True))
    assert make_plan(fused).moments["optimiser step"].temporaries == 0


def test_sharding_divides_what_stays_and_gathers_layers_in_bfloat16():
    one, eight = make_plan(FULL), make_plan(replace(FULL, gpus=8))
    for part in ("weights", "optimizer"):
        assert getattr(eight.peak, part) == getattr(one.peak, part) / 8
    layer, table = count_parameters(FULL).layer, 152_064 * 3_584
    assert eight.moments["backward, last layer"].copies == 2 * (2 * layer + table)
    assert eight.moments["forward, at the head"].copies == 2 * table


def test_sharded_adapters_keep_embeddings_head_and_their_own_gradients_whole():
    setting = replace(FULL, lora=LoraParams(rank=16, alpha=32, targets="all-linear"), dtype=torch.bfloat16, gpus=8)
    once, twice = make_plan(setting), make_plan(replace(setting, accumulation=2))
    layer, trainable, table = once.parameters.layer, once.parameters.trainable, 152_064 * 3_584
    assert once.moments["forward, at the head"].copies == 2 * 2 * table
    assert once.moments["backward, first layer"].copies == 2 * (layer + 2 * table)
    name = "forward, at the head"
    assert twice.moments[name].gradients - once.moments[name].gradients == 4 * trainable


@pytest.mark.parametrize("setting", [QLORA, FULL], ids=["qlora", "full"])
def test_what_takes_more(setting):
    def total(moment, **change):
        return make_plan(replace(setting, **change)).moments[moment].total

    forward, backward = "forward, at the head", "backward, at the head"
    for change in ({"rows": 8}, {"length": 4096}, {"head_chunk": 2048}):
        assert total(forward, **change) > total(forward)
    assert total(forward, compiled=True) < total(forward)
    kept = [total(backward, checkpointed=layers) for layers in (False, 14, True)]
    assert kept == sorted(kept, reverse=True) and kept[0] > kept[2]
    assert total(backward, accumulation=2) - total(backward) == count_parameters(setting).gradients


def test_changes_come_in_order_each_with_its_figure():
    pytest.importorskip("bitsandbytes")
    found = changes(replace(FULL, length=8192, checkpointed=False), gpu_gib=48)
    names = ["batch_size=1", "max_length=4096", "gradient_checkpointing=true", "single_gpu_full", "single_gpu_qlora"]
    words = [*names, "fsdp_full.yaml on 2 GPUs", "fsdp_full.yaml on 4 GPUs"]
    assert len(found) == len(words) and all(word in options for word, (options, _) in zip(words, found, strict=True))
    batch, length, checkpointing, eight_bit, four_bit, two, four = (plan.needed_gib for _, plan in found)
    assert batch > length > checkpointing > eight_bit > four_bit and checkpointing > two > 48 >= four
    assert found[0][1].setting.accumulation == 4  # the step stays the same
    assert [options for options, _ in changes(replace(QLORA, rows=1, length=1024), 4)] == []
