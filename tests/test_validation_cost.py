"""What a validation costs: against measurements, against the forwards of a model, and in the shipped configs."""

import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import yaml
from material import tiny_data
from torch.optim import AdamW

from dream_lightning import DreamConfig, SamplingParams
from dream_lightning.adapters import LoraParams
from dream_lightning.cli import shipped_configs
from dream_lightning.memory import Setting
from dream_lightning.training.optimizer import AdamW8bit
from dream_lightning.validation_cost import (
    H100,
    Answering,
    answer_gib,
    answer_seconds,
    describe_answering,
    forward_seconds,
    likelihood_seconds,
)

LORA = Setting(
    DreamConfig(), rows=1, length=8192, optimizer=AdamW, dtype=torch.bfloat16, lora=LoraParams(), compiled=True
)
QLORA = replace(LORA, four_bit=True)


@pytest.mark.parametrize(
    ("setting", "rows", "columns", "compiled", "milliseconds"),
    [
        (LORA, 1, 512, True, 12.1), (LORA, 8, 512, True, 88.7), (LORA, 1, 33, True, 6.3), (LORA, 1, 65, True, 6.4),
        (LORA, 1, 512, False, 33.9), (QLORA, 1, 512, True, 18.1), (QLORA, 1, 33, True, 14.3),
        (QLORA, 1, 512, False, 56.5),
    ],
)  # fmt: skip
def test_a_forward_takes_what_was_measured_on_an_h100(setting, rows, columns, compiled, milliseconds):
    """docs/performance.md."""
    options = {"logits": rows * min(columns, 256) / 2, "compiled": compiled}
    seconds = forward_seconds(setting, H100, rows=rows, columns=columns, **options)
    assert 1000 * seconds == pytest.approx(milliseconds, rel=0.15)


@pytest.mark.parametrize(
    ("a_forward", "speeds"),
    [(1, (145, 705, 868)), (2, (299, 1178, 1381)), (4, (567, 1718, 1934)), (8, (1032, 2244, 2431))],
)
def test_answers_take_what_was_measured_on_an_h100(a_forward, speeds):
    params = SamplingParams(
        max_new_tokens=256, steps=256, forbid_mask=True, block_length=32, cache="dual", compile=True
    )
    for rows, speed in zip((1, 8, 32), speeds, strict=True):
        asked = Answering(rows, rows, 256, replace(params, tokens_per_step=a_forward))
        assert rows * 256 / answer_seconds(LORA, asked, H100) == pytest.approx(speed, rel=0.15)


@pytest.mark.parametrize(
    "options",
    [
        {"steps": 12}, {"steps": 24, "tokens_per_step": 2}, {"steps": 24, "block_length": 8},
        {"steps": 12, "block_length": 8, "cache": "dual"}, {"steps": 24, "block_length": 8, "cache": "prefix"},
        {"steps": 24, "block_length": 8, "cache": "dual", "refresh_every": 3},
    ],
)  # fmt: skip
def test_the_forwards_are_those_of_the_sampler(deep, prompts, run, calls, options):
    seen = calls(deep)
    run(deep, prompts(2), **options)
    asked = Answering(4, 2, 7, SamplingParams(max_new_tokens=24, forbid_mask=True, **options))
    whole = [columns for _, columns in seen if columns == 31]
    windows = [columns for _, columns in seen if columns != 31]
    assert asked.batches == 2
    for found, most in zip((whole, windows), asked.forwards, strict=True):  # the authors' schedule leaves steps empty
        assert 0.75 * most <= len(found) <= most
    assert not windows or sum(windows) / len(windows) == pytest.approx(asked.window)


TOKENS = 1000 * 415_058 / 91  # s1K, docs/data.md
TRAINS = {  # tokens/s a GPU and what a card holds: docs/performance.md, README
    "single_gpu_qlora": (10_800, 24),
    "single_gpu_lora": (10_800, 32),
    "single_gpu_full": (12_300, 80),
    "ddp_qlora": (10_800, 24),
    "fsdp_lora": (8_982, 24),
    "fsdp_full": (7_415, 80),
}


@pytest.mark.parametrize("name", TRAINS)
def test_a_shipped_config_validates_in_15_percent_of_its_fit(name):
    """At most, with every answer of full length; and it fits the card."""
    config = yaml.safe_load(shipped_configs()[name].read_text())
    model, data, trainer = config["model"], config["data"], config["trainer"]
    speed, card = TRAINS[name]
    lora = LoraParams(**model["lora"]) if "lora" in model else None
    kind = AdamW8bit if "AdamW8bit" in str(model["optimizer"]) else AdamW
    dtype, four_bit = getattr(torch, model["dtype"]), model.get("quantize") == "nf4"
    setting = replace(LORA, lora=lora, four_bit=four_bit, dtype=dtype, optimizer=kind)
    for gpus in (1,) if name.startswith("single") else (2, 8):
        s = replace(setting, gpus=gpus if "fsdp" in name else 1)
        params = SamplingParams(**model["sampling"])
        asked = Answering(data["validation_questions"], data["question_batch_size"], 256, params, gpus)
        tokens = int(TOKENS * data["validation_fraction"] * data["validation_draws"])
        validations = trainer["max_epochs"] / trainer.get("check_val_every_n_epoch", 1)
        spent = validations * (answer_seconds(s, asked, H100) + likelihood_seconds(s, tokens, H100, gpus))
        training = TOKENS * (1 - data["validation_fraction"]) * trainer["max_epochs"] / (speed * gpus)
        assert spent <= 0.15 * (spent + training), f"{spent:.0f} s next to {training:.0f}"
        assert answer_gib(s, asked) < 0.93 * card
        print(f"{name} {gpus} GPUs: {validations:g} × {spent / validations:.0f} s, {training:.0f} s of training")


def test_a_plan_says_it_in_a_line():
    params = SamplingParams(
        max_new_tokens=1024, steps=512, forbid_mask=True, block_length=32, cache="dual", compile=True
    )
    assert re.fullmatch(
        r"Validation: 32 questions, 32 at once, of 256 \+ 1,024 tokens: at most 32 forwards and 480 next to the KV "
        r"cache, \d\d s on an H100, 15.\d GiB",
        describe_answering(QLORA, Answering(32, 32, 256, params), H100),
    )
    assert describe_answering(QLORA, Answering(0, 32, 256, params), H100) == "Validation answers no questions."


def test_questions_have_batches_of_their_own_by_length(sums, tmp_path):
    data = tiny_data(sums, tmp_path, validation_questions=4, question_batch_size=3, validation_fraction=0.2)
    data.trainer = SimpleNamespace(world_size=1, global_rank=0, lightning_module=None, state=SimpleNamespace(fn="fit"))
    data.setup("fit")
    likelihood, questions = data.val_dataloader()
    assert [len(batch.input_ids) for batch in questions] == [3, 1] and likelihood.batch_size == 4
    lengths = [n for batch in questions for n in batch.attention_mask.sum(1).tolist()]
    assert lengths == sorted(data.prompt_lengths(), reverse=True)
