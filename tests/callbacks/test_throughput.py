"""Throughput, by a clock that the test turns."""

from types import SimpleNamespace

import lightning as L
import pytest

from dream_lightning import DreamModule, S1KDataModule
from dream_lightning.callbacks import Throughput, throughput

SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


class Clock(L.Callback):
    """A second for every training batch, a thousand for every validation batch."""

    def __init__(self):
        self.now, self.padded, self.logged = 0.0, 0, {}

    def perf_counter(self):
        return self.now

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.now += 1
        self.padded += batch.input_ids.numel()

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        self.now += 1000


class Notes(L.pytorch.loggers.logger.DummyLogger):
    """step → tokens per second, as a logger gets them."""

    def __init__(self):
        super().__init__()
        self.speeds = {}

    def log_metrics(self, metrics, step=None):
        if "train/tokens_per_second" in metrics:
            self.speeds[step] = metrics["train/tokens_per_second"]


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("validate_every", [3, 9])
def test_real_tokens_over_training_time(sums, tmp_path, monkeypatch, accumulate, validate_every):
    """36 documents in 9 batches an epoch, one second each; logged once an epoch, validated in the middle or after."""
    clock, notes = Clock(), Notes()
    monkeypatch.setattr(throughput, "time", SimpleNamespace(perf_counter=clock.perf_counter))
    module = DreamModule(new_model=SIZES, tokenizer="bytes")
    data = S1KDataModule(
        str(sums), tokenizer=module.tokenizer, batch_size=4, validation_questions=0, cache_dir=str(tmp_path / "cache")
    )
    steps = 9 // accumulate
    L.Trainer(
        accelerator="cpu",
        logger=notes,
        callbacks=[clock, Throughput()],
        default_root_dir=tmp_path,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        accumulate_grad_batches=accumulate,
        log_every_n_steps=steps,
        val_check_interval=validate_every,
        max_steps=2 * steps,
    ).fit(module, data)
    tokens = int(data.train_set.lengths.sum())
    assert clock.now > 1000 and tokens < clock.padded / 2  # both would show
    assert notes.speeds == {steps - 1: pytest.approx(tokens / 9), 2 * steps - 1: pytest.approx(tokens / 9)}
