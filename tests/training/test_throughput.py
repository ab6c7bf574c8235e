"""Throughput, with a clock that the test sets."""

from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from material import logged, quiet_trainer, tiny_module

from dream_lightning import S1KDataModule
from dream_lightning.data import epoch_order as order
from dream_lightning.data.epoch_order import ResumableLoader
from dream_lightning.model.flops import training_cost
from dream_lightning.training import Throughput, throughput


class Clock(L.Callback):
    """One second for every training batch, a thousand for every validation batch."""

    def __init__(self):
        self.now, self.padded, self.masked = 0.0, 0, 0

    def perf_counter(self):
        return self.now

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.now += 1
        self.padded += batch.input_ids.numel()
        self.masked += int(pl_module.noise(batch).is_masked.sum())

    def on_train_start(self, trainer, pl_module):
        self.start = self.now

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.end = self.now

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        self.now += 1000


class SlowData(S1KDataModule):
    """A quarter of a second for every batch."""

    def train_dataloader(self):
        loader = super().train_dataloader()

        def slow(rows):
            self.clock.now += 0.25
            return loader.collate_fn(rows)

        return ResumableLoader(loader.dataset, batch_size=4, sampler=loader.sampler, collate_fn=slow)


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("validate_every", [3, 9])
def test_real_tokens_over_training_time(sums, tmp_path, monkeypatch, accumulate, validate_every):
    """36 documents in 9 batches an epoch, one second each; logged once an epoch, validated in the middle or after."""
    clock = Clock()
    monkeypatch.setattr(throughput, "time", SimpleNamespace(perf_counter=clock.perf_counter))
    module = tiny_module()
    module.matmul_ceiling = lambda: 1e6
    options = {"tokenizer": module.tokenizer, "batch_size": 4, "validation_questions": 0}
    data = SlowData(str(sums), cache_dir=str(tmp_path / "cache"), **options)
    data.clock = clock
    monkeypatch.setattr(order, "time", SimpleNamespace(perf_counter=clock.perf_counter))
    steps = 9 // accumulate
    trainer = quiet_trainer(
        clock,
        Throughput(),
        **{"max_steps": 2 * steps, "accumulate_grad_batches": accumulate, "log_every_n_steps": steps},
        **{"val_check_interval": validate_every, "default_root_dir": tmp_path, "logger": TensorBoardLogger(tmp_path)},
    )
    trainer.fit(module, data)
    tokens, seconds = int(data.train_set.lengths.sum()), 9 * 1.25
    assert clock.now > 1000 and tokens < clock.padded / 2  # both would show

    def scalars(name):
        return {step: float(*values) for (n, step), values in logged(tmp_path).items() if n == f"train/{name}"}

    def both_epochs(value):
        return {steps - 1: pytest.approx(value), 2 * steps - 1: pytest.approx(value)}

    assert scalars("tokens_per_second") == both_epochs(tokens / seconds)
    assert sum(tokens / share for share in scalars("useful_share").values()) == pytest.approx(clock.padded)
    assert scalars("tokens") == {steps - 1: tokens, 2 * steps - 1: 2 * tokens}
    assert scalars("device_hours")[2 * steps - 1] * 3600 == pytest.approx(clock.end - clock.start)  # with validation
    assert scalars("data_wait_share") == both_epochs(0.25 / 1.25)
    lengths = data.train_set.lengths
    flops = training_cost(module.model).of(2 * tokens, 2 * int((lengths**2).sum()), clock.masked)
    assert module.training_flops() == flops
    assert sum(scalars("mfu").values()) == pytest.approx(flops / seconds / 1e6)
    assert {"train/mfu", "train/useful_share", "train/data_wait_share"} <= trainer.progress_bar_metrics.keys()
    assert not scalars("peak_memory_gib")  # of a GPU


def test_queued_work_of_a_gpu_counts(monkeypatch):
    """Reading the tokens synchronizes with the GPU, and comes before reading the clock."""

    class Queued:
        def __int__(self):
            clock.now += 2
            return 100

        def __float__(self):
            return float(int(self))

    clock, callback = Clock(), Throughput()
    monkeypatch.setattr(throughput, "time", SimpleNamespace(perf_counter=clock.perf_counter))
    strategy = SimpleNamespace(reduce=lambda numbers, reduce_op: numbers)
    trainer = SimpleNamespace(strategy=strategy, train_dataloader=None, global_step=0, world_size=1)
    module = SimpleNamespace(device=torch.device("cpu"))

    for validates in (False, True):
        callback._start(trainer, flops=0)
        callback._tokens, callback._positions = Queued(), 100
        if validates:
            callback.on_validation_start(trainer, module)
            clock.now += 1000
            callback.on_validation_end(trainer, module)
        assert callback._scalars(trainer, module, flops=0)["tokens_per_second"] == 100 / 2
