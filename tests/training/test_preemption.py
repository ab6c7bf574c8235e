"""Runs that are told to stop: what they save, and that going on changes nothing."""

import csv
import os
import shutil
import signal
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.trainer.states import TrainerFn
from material import addition_rows, write_jsonl

from dream_lightning import DreamModule, S1KDataModule, SamplingParams
from dream_lightning.training import Autosave
from dream_lightning.training.preemption import STEP_METRICS

STEPS = 16
METRICS = ("train/loss", "train/gradient_norm", "train/lr", "val/nll", "val/accuracy")


class Signal(L.Callback):
    """Sends a signal to this process at one moment: `hook` after step `step`, in validation data `loader`."""

    def __init__(self, hook, step, loader=0, number=signal.SIGTERM, times=1):
        self.hook, self.step, self.loader, self.number, self.times = hook, step, loader, number, times

    def _send(self, trainer):
        if trainer.global_step == self.step and self.times and not trainer.sanity_checking:
            self.times -= 1
            signal.raise_signal(self.number)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if self.hook == "first micro-batch" and batch_idx % 2 == 0:
            self._send(trainer)

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if self.hook == "optimiser step":
            self._send(trainer)

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        if self.hook == "validation" and dataloader_idx == self.loader:
            self._send(trainer)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_jsonl(tmp_path_factory.mktemp("autosave") / "sums.jsonl", addition_rows(30))


def fit(source, folder, *callbacks, ckpt_path=None, every=100, **options):
    """9 micro-batches an epoch, 2 a step (1 in its last); validation after steps 3, 10, 13 and in the middle of 7."""
    torch.manual_seed(0)
    module = DreamModule(
        new_model={"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2},
        tokenizer="bytes",
        optimizer=lambda groups: torch.optim.AdamW(groups, lr=1e-2),
        sampling=SamplingParams(max_new_tokens=4, steps=2),
    )
    data = S1KDataModule(
        str(source),
        tokenizer=module.tokenizer,
        batch_size=3,
        validation_questions=3,
        cache_dir=str(source.parent / "c"),
    )
    autosave = Autosave(folder / "checkpoints", every_n_train_steps=every, save_top_k=0, save_last=True)
    trainer = L.Trainer(
        **{"accelerator": "cpu", "max_steps": STEPS, "accumulate_grad_batches": 2, "gradient_clip_val": 1.0},
        **{"val_check_interval": 6, "check_val_every_n_epoch": None, "limit_val_batches": 1, "log_every_n_steps": 1},
        **{"enable_progress_bar": False, "enable_model_summary": False},
        logger=CSVLogger(folder, flush_logs_every_n_steps=1),
        callbacks=[autosave, *callbacks],
        **options,
    )
    trainer.fit(module, data, ckpt_path=ckpt_path, weights_only=True)
    return module


def logged(folder):
    """(name, step) → value as it was written, from all attempts."""
    values = {}
    for file in sorted(folder.rglob("metrics.csv")):
        with file.open() as lines:
            for row in csv.DictReader(lines):
                values |= {(name, row["step"]): row[name] for name in METRICS if row.get(name)}
    return values


def saved_step(folder):
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return fit(source, folder), logged(folder)


def assert_same(module, folder, whole):
    for p, q in zip(whole[0].parameters(), module.parameters(), strict=True):
        assert torch.equal(p, q)
    assert logged(folder) == whole[1]


@pytest.mark.parametrize(
    ("moment", "step"),
    [
        (Signal("first micro-batch", 3), 4),
        (Signal("first micro-batch", 4), 5),
        (Signal("first micro-batch", 9), 10),
        (Signal("optimiser step", 0), 1),
        (Signal("validation", 10), 10),
        (Signal("validation", 13, loader=1), 13),
        (Signal("validation", 6), 7),
        (Signal("first micro-batch", 6, number=signal.SIGINT), 7),
    ],
    ids=["step", "end of epoch", "before validation", "first step", "validation", "later", "both", "Ctrl-C"],
)
def test_told_to_stop_it_saves_and_goes_on_as_if_nothing_had_been(source, tmp_path, whole, capfd, moment, step):
    with pytest.raises(SystemExit) as stop:
        fit(source, tmp_path, moment)
    assert stop.value.code == 128 + moment.number
    assert saved_step(tmp_path) == step
    assert f"{moment.number.name}: stopping after this optimiser step" in capfd.readouterr().err
    assert_same(fit(source, tmp_path, ckpt_path="last"), tmp_path, whole)


def test_stopped_again_and_again(source, tmp_path, whole):
    for step in (1, 2, 3, 6, 9):
        with pytest.raises(SystemExit):
            fit(source, tmp_path, Signal("first micro-batch", step), ckpt_path="last")
        assert saved_step(tmp_path) == step + 1
    assert_same(fit(source, tmp_path, ckpt_path="last"), tmp_path, whole)


def test_a_second_ctrl_c_stops_at_once_without_saving(source, tmp_path, capfd):
    with pytest.raises(SystemExit) as stop:
        fit(source, tmp_path, Twice())
    assert stop.value.code == 1 and not (tmp_path / "checkpoints").exists()


class Twice(L.Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 4:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)


def test_the_former_handlers_are_back_afterwards(source, tmp_path):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit):
        fit(source, tmp_path, Signal("optimiser step", 0))
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_a_save_is_never_in_the_middle_of_a_step(source, tmp_path, whole):
    """Lightning saves again at the first micro-batch after resuming from a step to save at."""

    class Die(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 3 and batch_idx == 7:
                raise KeyError("killed in the middle of the fourth step")

    for ckpt_path in (None, "last"):
        with pytest.raises(KeyError):
            fit(source, tmp_path, Die(), every=3, ckpt_path=ckpt_path)
    assert_same(fit(source, tmp_path, every=3, ckpt_path="last"), tmp_path, whole)


def test_killed_in_a_validation_it_validates_again(source, tmp_path, whole):
    """Lightning would leave out the validation that belongs to the step it resumes from."""

    class Die(L.Callback):
        def on_validation_batch_end(self, trainer, *args):
            if trainer.global_step == 10:
                raise KeyError("killed")

    with pytest.raises(KeyError):
        fit(source, tmp_path, Die(), every=5)
    assert_same(fit(source, tmp_path, every=5, ckpt_path="last"), tmp_path, whole)


@pytest.mark.parametrize("step", [6, STEPS], ids=["in the middle", "last step"])
def test_killed_behind_a_save_it_logs_that_step_too(source, tmp_path, whole, monkeypatch, step):
    """Lightning hands a step's metrics to the loggers after the callbacks have saved."""

    def die(module):
        if module.trainer.global_step == step and not module.trainer.fit_loop._should_accumulate():
            raise KeyError("killed")

    with monkeypatch.context() as patched, pytest.raises(KeyError):
        patched.setattr(DreamModule, "on_train_batch_end", lambda module, *args: die(module))
        fit(source, tmp_path, every=6)
    assert saved_step(tmp_path) == step
    assert ("train/loss", str(step - 1)) not in logged(tmp_path)
    assert_same(fit(source, tmp_path, every=6, ckpt_path="last"), tmp_path, whole)


@pytest.mark.parametrize(("fn", "taken"), [(TrainerFn.VALIDATING, False), (TrainerFn.FITTING, True)])
def test_only_a_run_that_goes_on_takes_the_metrics_of_its_checkpoint(tmp_path, fn, taken):
    """Of one that was only looked at, they would stand in the log of the next `fit`."""
    written = []
    connector = SimpleNamespace(log_metrics=lambda metrics, step: written.append(step))
    trainer = SimpleNamespace(state=SimpleNamespace(fn=fn), _logger_connector=connector)
    autosave = Autosave(tmp_path)
    autosave.on_load_checkpoint(trainer, None, {STEP_METRICS: (3, {"train/loss": 1.0})})
    autosave.on_fit_end(trainer, None)
    assert written == [3] * taken


def test_a_diverged_run_does_not_replace_its_last_good_checkpoint(source, tmp_path):
    class Diverge(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 7:
                next(pl_module.parameters()).data.fill_(torch.nan)

    with pytest.raises(ValueError, match="train/loss is nan at step 9: the run has diverged"):
        fit(source, tmp_path, Diverge(), every=3)
    assert saved_step(tmp_path) == 6


def test_the_last_step_is_saved_whatever_the_interval(source, tmp_path, whole):
    fit(source, tmp_path, every=7)
    assert saved_step(tmp_path) == STEPS
    again = fit(source, tmp_path, every=7, ckpt_path="last")  # nothing left to do
    assert_same(again, tmp_path, whole)
    assert saved_step(tmp_path) == STEPS


def test_early_stopping_saves_where_it_stops(source, tmp_path):
    fit(source, tmp_path, EarlyStopping("val/nll", mode="max", patience=1))
    assert saved_step(tmp_path) == 6


def test_what_a_kill_left_half_written_is_removed(source, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.ckpt.partial").write_text("torn")
    with pytest.warns(UserWarning, match="no last checkpoint available"):
        fit(source, tmp_path, ckpt_path="last")
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["last.ckpt"]


def test_a_new_run_in_the_folder_of_another_is_pointed_out_and_overwrites_nothing(source, tmp_path):
    with pytest.raises(SystemExit):
        fit(source, tmp_path, Signal("optimiser step", 2))
    with pytest.warns(UserWarning, match="belongs to another run.*--ckpt_path last"):
        fit(source, tmp_path)
    assert saved_step(tmp_path) == 3 and (tmp_path / "checkpoints" / "last-v1.ckpt").exists()


def test_every_n_steps_last_and_best_side_by_side(source, tmp_path):
    folder = tmp_path / "checkpoints"
    best = ModelCheckpoint(folder, filename="best-{step}", monitor="val/nll", enable_version_counter=False)
    kept = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=5, save_top_k=-1)
    fit(source, tmp_path, best, kept)
    names = {path.name for path in folder.iterdir()}
    assert names == {"best-step=13.ckpt", "step=5.ckpt", "step=10.ckpt", "step=15.ckpt", "last.ckpt"}


def test_slurms_preemption_waits_for_the_end_of_the_step(source, tmp_path, whole, monkeypatch):
    """Lightning saves hpc_ckpt_1.ckpt and requeues the job; in the middle of a step that would lose gradients."""
    (tmp_path / "bin").mkdir()
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.write_text(f"#!/bin/sh\necho $* > {tmp_path}/requeued\n")
    scontrol.chmod(0o755)
    for name, value in {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        **{"SLURM_NTASKS": "1", "SLURM_JOB_ID": "17", "SLURM_JOB_NAME": "dream", "SLURM_NODELIST": "localhost"},
        **{"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"},
    }.items():
        monkeypatch.setenv(name, value)
    preemption = Signal("first micro-batch", 3, number=signal.SIGUSR1)
    assert_same(fit(source, tmp_path, preemption, default_root_dir=tmp_path), tmp_path, whole)  # it went on meanwhile
    assert (tmp_path / "requeued").read_text() == "requeue 17\n"
    assert torch.load(tmp_path / "hpc_ckpt_1.ckpt", weights_only=True)["global_step"] == 4
    shutil.rmtree(tmp_path / "lightning_logs")
    again = fit(source, tmp_path, default_root_dir=tmp_path)  # as the requeued job starts: without --ckpt_path
    for p, q in zip(whole[0].parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)
    assert min(int(step) for _, step in logged(tmp_path)) == 3  # of the fourth step, behind which it was saved
