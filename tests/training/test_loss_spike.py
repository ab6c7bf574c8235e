"""Spikes of the loss: who is named, which weights change, and what a resume does."""

import json
import math
import os
import random
from functools import partial
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from material import SIZES, Recorder, addition_rows, short_trainer, tiny_data, tiny_module, write_jsonl
from meeting import MeetingPoint, end, fork

from dream_lightning import DreamModule
from dream_lightning.errors import UserError
from dream_lightning.training import Autosave, LossSpike
from dream_lightning.training.optimizer import AdamW8bit

SPIKE, STEPS = 34, 37  # a step with the planted record; of a run
SIZES = SIZES | {"num_hidden_layers": 1}


class Weights(Recorder):
    """Also the weights before the first and after every step."""

    def __init__(self):
        super().__init__()
        self.weights = []

    def on_train_start(self, trainer, pl_module):
        super().on_train_start(trainer, pl_module)
        self.keep(pl_module)

    def on_train_batch_end(self, trainer, pl_module, *args):
        super().on_train_batch_end(trainer, pl_module, *args)
        if len(self.losses) == len(self.weights):
            self.keep(pl_module)

    def keep(self, pl_module):
        self.weights.append(torch.cat([p.detach().flatten() for p in pl_module.parameters()]))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    rows, rng = addition_rows(40), random.Random(0)
    noise = "".join(chr(rng.randrange(0x4E00, 0x9FFF)) for _ in range(60))
    rows[17] |= {"id": "planted", "thinking_trajectories": [noise]}
    return write_jsonl(tmp_path_factory.mktemp("spikes") / "rows.jsonl", rows)


def fit(
    source,
    folder,
    *callbacks,
    steps=STEPS,
    devices=1,
    ckpt_path=None,
    optimizer=torch.optim.AdamW,
    kind=DreamModule,
    **options,
):
    """Two micro-batches a step. What was recorded, and the trainer."""
    module = tiny_module(
        kind,
        **{"weighting": "none", "normalizer": "masked", "new_model": SIZES, **options},
        optimizer=lambda groups: optimizer(groups, lr=1e-2),
    )
    trainer = short_trainer(
        folder, *callbacks, seen := Weights(), max_steps=steps, accumulate_grad_batches=2, devices=devices
    )
    data = tiny_data(source, source.parent, batch_size=2, validation_fraction=0.05)
    trainer.fit(module, data, ckpt_path=ckpt_path, weights_only=True)
    return seen, trainer


def callback(action):
    return LossSpike(action, deviations=3.0, window=20, samples=2)


def spikes(folder):
    return [json.loads(line) for line in (folder / "loss_spikes.jsonl").read_text().splitlines()]


def test_the_planted_record_is_named_and_the_run_unchanged(source, tmp_path):
    plain, _ = fit(source, tmp_path)
    with pytest.warns(
        UserWarning, match=r"loss spike at step 34: 4\.\d+, limit 3\.\d+. Most of it is from planted \(\d\d%\)"
    ):
        seen, _ = fit(source, tmp_path, callback("log"))
    assert seen.losses == plain.losses
    assert [spike["step"] for spike in spikes(tmp_path)] == [SPIKE]
    for spike in spikes(tmp_path):
        first, second = spike["samples"]
        assert first["id"] == "planted" and "罏菕匮漤" in first["text"] and first["nll"] > 2 * second["nll"]
        assert spike["loss"] == seen.losses[spike["step"]] > spike["limit"]


@pytest.mark.parametrize("options", [{}, {"dtype": "bfloat16", "optimizer": AdamW8bit}], ids=["float32", "bfloat16"])
def test_a_skipped_step_leaves_the_weights_and_a_resumed_run_skips_it_too(source, tmp_path, options):
    """In bfloat16 kernels hold on to the gradients."""
    save = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    seen, _ = fit(source, tmp_path, callback("skip"), save, **options)
    assert [spike["step"] for spike in spikes(tmp_path)] == [SPIKE]
    unchanged = [torch.equal(before, after) for before, after in pairwise(seen.weights)]
    unchanged[0] = False  # a learning rate of 0
    assert (
        [n for n, same in enumerate(unchanged) if same]
        == [n for n, norm in enumerate(seen.norms) if norm == 0]
        == [SPIKE]
    )
    for step in (33, 35):
        again, _ = fit(source, tmp_path, callback("skip"), ckpt_path=tmp_path / f"step={step}.ckpt", **options)
        assert again.losses == seen.losses[step:] and torch.equal(again.weights[-1], seen.weights[-1])


def test_it_stops_saved_with_the_weights_before_the_spike(source, tmp_path):
    seen, trainer = fit(source, tmp_path, callback("stop"), Autosave(tmp_path / "saved", save_top_k=0, save_last=True))
    assert trainer.global_step == 35 and torch.equal(seen.weights[-2], seen.weights[-1])
    saved = torch.load(tmp_path / "saved" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 35
    assert torch.equal(torch.cat([p.flatten() for p in saved["state_dict"].values()]), seen.weights[-1])


class NaN(DreamModule):
    """One loss is not a number; or the weights are not, from then on."""

    broken_weights = False

    def masked_nll(self, batch, noised):
        nll = super().masked_nll(batch, noised)
        if self.trainer.global_step != 3 or self.global_rank != self.trainer.world_size - 1:
            return nll
        if self.broken_weights:
            next(self.parameters()).data.fill_(torch.nan)
        return nll * torch.nan


def test_a_loss_that_is_not_finite_is_skipped_unless_the_weights_are_not_finite_either(source, tmp_path, monkeypatch):
    save = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    seen, _ = fit(source, tmp_path, callback("skip"), save, steps=6, kind=NaN)
    assert math.isnan(seen.losses[3]) and torch.equal(seen.weights[3], seen.weights[4])
    assert all(map(math.isfinite, seen.losses[4:])) and (tmp_path / "step=4.ckpt").exists()
    assert (spikes(tmp_path)[0]["loss"], spikes(tmp_path)[0]["limit"]) == ("NaN", "Infinity")
    monkeypatch.setattr(NaN, "broken_weights", True)
    with pytest.raises(UserError, match="train/loss is nan at step 4: the run has diverged"):
        fit(source, tmp_path, callback("skip"), save, steps=6, kind=NaN)


def one_rank(rank, source, folder, environment):
    os.environ |= environment | {"TORCHELASTIC_RUN_ID": "spike", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0"}
    seen, _ = fit(source, folder, callback("skip"), steps=5, devices=2, kind=NaN)
    torch.save(seen.weights, folder / f"{rank}.pt")


def test_two_ranks_skip_the_step_of_one_of_them(source, tmp_path):
    meeting = MeetingPoint()
    works = [partial(one_rank, rank, source, tmp_path, meeting.environment) for rank in (0, 1)]
    assert [end(pid) for pid in [fork(work) for work in works]] == [0, 0]
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert (
        all(map(torch.equal, first, second)) and torch.equal(first[3], first[4]) and not torch.equal(first[4], first[5])
    )
    (spike,) = spikes(tmp_path)
    assert [sample["nll"] for sample in spike["samples"]] == ["NaN", "NaN"]  # of the other rank


def test_a_loss_that_has_risen_for_good_is_soon_no_spike(tmp_path):
    spike = LossSpike()
    module = SimpleNamespace(totals=SimpleNamespace(parts=[]))
    trainer = SimpleNamespace(world_size=1, is_global_zero=True, log_dir=None, default_root_dir=tmp_path, global_step=0)
    trainer.datamodule = None
    trainer.strategy = SimpleNamespace(reduce_boolean_decision=bool)
    for loss in [1.0, 1.1] * 50 + [9.0] * 100:
        trainer.callback_metrics, trainer.global_step = {"train/loss": loss}, trainer.global_step + 1
        spike.on_before_optimizer_step(trainer, module, SimpleNamespace(param_groups=[]))
    steps = [line["step"] for line in spikes(tmp_path)]
    assert steps[0] == 101 and steps == list(range(101, 101 + len(steps))) and len(steps) < 40
    for wrong in ({"window": 19}, {"samples": 0}, {"deviations": -1}):
        with pytest.raises(UserError, match=f"LossSpike's {next(iter(wrong))} is"):
            LossSpike(**wrong)
