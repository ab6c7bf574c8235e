"""Checkpoint files: written without a copy in memory, named errors, and what does not fit the model is refused."""

import re
import tracemalloc
import warnings
from contextlib import ExitStack
from fractions import Fraction
from functools import partial
from inspect import signature

import lightning as L
import pytest
import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers.logger import DummyLogger
from material import SIZES, Recorder, short_trainer, tiny_data, tiny_module
from test_atomic import files_up_to

from dream_lightning import DreamModule, S1KDataModule
from dream_lightning.training import Autosave
from dream_lightning.training.checkpointing import (
    _SETTINGS,
    SafeCheckpointIO,
    check_checkpoint,
    check_keyword,
    rescale_progress,
    tensor_bytes,
)

STATE = {"step": 1, "weight": torch.ones(1_000_000)}


@pytest.fixture
def path(tmp_path):
    SafeCheckpointIO().save_checkpoint(STATE, tmp_path / "checkpoints" / "last.ckpt")
    return tmp_path / "checkpoints" / "last.ckpt"


def test_last_is_looked_for_where_lightning_does(path, tmp_path):
    """A logger of another kind has its checkpoints in save_dir/name/version, and `last` may have a number."""

    class Logger(DummyLogger):
        save_dir, name, version = str(tmp_path.parent), tmp_path.name, ""

    trainer = L.Trainer(logger=Logger(), callbacks=[ModelCheckpoint()], accelerator="cpu")
    check_keyword(trainer, "last")
    path = path.rename(path.with_name("last-v1.ckpt"))
    check_keyword(trainer, "last")
    path.unlink()
    with pytest.raises(ValueError, match=r"no last\.ckpt in the folder of the logger"):
        check_keyword(trainer, "last")


def test_it_is_written_without_a_copy_in_memory(path):
    """Lightning's own writer builds the whole file in memory, twice."""
    peaks = []
    for io in (SafeCheckpointIO(), TorchCheckpointIO()):
        tracemalloc.start()
        io.save_checkpoint(STATE, path)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[0] < 100_000 and peaks[1] > 4_000_000


def test_what_cannot_be_read_is_a_user_error(path, tmp_path):
    read = partial(SafeCheckpointIO().load_checkpoint, weights_only=True)
    assert read(path)["step"] == 1
    with pytest.raises(ValueError, match="is a folder, a sharded checkpoint"):
        read(path.parent)
    with pytest.raises(ValueError, match="does not exist"):
        read(tmp_path / "none.ckpt")
    whole = path.read_bytes()
    flipped = bytearray(whole), bytearray(whole)
    for content, position in zip(flipped, (len(whole) // 2, whole.index(b"weight")), strict=True):
        content[position] ^= 1
    for content in (whole[:300], whole[:-1000], b"", b"text", *flipped):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"last.ckpt is damaged or no checkpoint .*: use an earlier one"):
            read(path)
    torch.save({"state": Fraction(1, 2)}, path)
    with pytest.raises(ValueError, match=r"last.ckpt is damaged or no checkpoint \(UnpicklingError"):
        read(path)


def test_urls_use_lightnings_writer():
    SafeCheckpointIO().save_checkpoint(STATE, "memory://runs/last.ckpt")
    assert SafeCheckpointIO().load_checkpoint("memory://runs/last.ckpt", weights_only=True)["step"] == 1


def test_bytes_of_nested_tensors_are_counted():
    assert tensor_bytes({"a": torch.ones(100), "b": [torch.ones(3).half(), (torch.ones(1), "x")], "c": 3}) == 410


def test_training_stops_at_a_full_disk_and_resumes_when_there_is_room(tmp_path, sums):
    def run(*callbacks, ckpt_path=None):
        autosave = Autosave(tmp_path / "checkpoints", every_n_train_steps=2, save_top_k=0, save_last=True)
        model, fit = tiny_module(), short_trainer(tmp_path, *callbacks, autosave, plugins=[SafeCheckpointIO()])
        fit.fit(model, tiny_data(sums, tmp_path), ckpt_path=ckpt_path, weights_only=True)
        return model

    class Fills(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 3:
                disk.enter_context(files_up_to(10_000))

    whole = run()
    (tmp_path / "checkpoints" / "last.ckpt").unlink()
    with ExitStack() as disk, pytest.raises(ValueError, match="was not written"):
        run(Fills())
    assert torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 2
    for p, q in zip(whole.parameters(), run(ckpt_path="last").parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize(
    ("change", "words"), [({"hidden_size": 64}, "hidden_size 32, here 64"), ({"rope_theta": 50.0}, "here 50.0")]
)
def test_a_checkpoint_of_another_network_is_refused(change, words):
    """By the name of what differs, not by the shapes of its tensors, which may agree."""
    saved, other = tiny_module(), tiny_module(new_model=SIZES | change)
    saved.configure_model()
    other.configure_model()
    checkpoint = {"dream_config": saved.model.config.to_dict()}
    check_checkpoint(checkpoint, saved)
    with pytest.raises(ValueError, match=words):
        check_checkpoint(checkpoint, other)
    with pytest.raises(ValueError, match="not saved by a DreamModule"):
        check_checkpoint({"state_dict": {}}, other)


@pytest.mark.parametrize("optimizers", [("AdamW", "SGD"), ("SGD", "AdamW")])
def test_another_optimizer_than_the_checkpoints_is_refused_in_fit_only(sums, tmp_path, optimizers):
    def using(name):
        return tiny_module(optimizer=lambda groups: getattr(torch.optim, name)(groups, lr=1e-3))

    first, second = optimizers
    trained = short_trainer(tmp_path, max_steps=1)
    trained.fit(using(first), tiny_data(sums, tmp_path))
    trained.save_checkpoint(tmp_path / "one.ckpt")
    resume = {"ckpt_path": tmp_path / "one.ckpt", "weights_only": True}
    with pytest.raises(ValueError, match=f"states of {first} and model.optimizer is {second}"):
        short_trainer(tmp_path, max_steps=2).fit(using(second), tiny_data(sums, tmp_path), **resume)
    validation, other = short_trainer(tmp_path, limit_val_batches=1), using(second)
    assert validation.validate(other, tiny_data(sums, tmp_path), verbose=False, **resume)
    short_trainer(tmp_path, max_steps=1).fit(other, tiny_data(sums, tmp_path))  # a new run, from the weights it has


def test_every_setting_that_differs_from_the_checkpoints_is_said_once(sums, tmp_path):
    """And does what is said: what is ignored changes nothing, what is taken does."""

    def losses(*, data=(), ckpt_path=None, steps=6, lr=3e-3, **options):
        seen = Recorder()
        module = tiny_module(optimizer=lambda groups: torch.optim.AdamW(groups, lr=lr), **options)
        trainer = short_trainer(tmp_path, seen, max_steps=steps)
        source = tiny_data(sums, tmp_path, **dict(data))
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            trainer.fit(module, source, ckpt_path=ckpt_path, weights_only=True)
        if ckpt_path is None:
            trainer.save_checkpoint(tmp_path / "a.ckpt")
        said = [str(warning.message) for warning in said]
        return seen.losses, [line for line in said if "in the checkpoint and is" in line]

    schedule = {"lr_schedule": "constant_with_warmup"}
    losses(steps=3, **schedule)
    resume = {"ckpt_path": tmp_path / "a.ckpt", **schedule}
    whole, said = losses(**resume)
    assert said == ["trainer.max_steps was 3 in the checkpoint and is 6: taken"]
    changes = [
        ({"lr": 1e-4}, "model.optimizer.lr was 0.003 in the checkpoint and is 0.0001: ignored"),
        ({"weighting": "none"}, "model.weighting was 'original' in the checkpoint and is 'none': taken"),
        ({"certainty_weight": 0.5}, "model.certainty_weight was 0.0 in the checkpoint and is 0.5: taken"),
        ({"seed": 1}, "model.seed was 0 in the checkpoint and is 1: taken"),
        ({"lr_schedule": "cosine"}, "model.lr_schedule was 'constant_with_warmup' in the checkpoint and is 'cosine'"),
        ({"data": {"thinking": False}}, "data.thinking was True in the checkpoint and is False: taken"),
        ({"data": {"batch_size": 2}}, "rows of an optimizer step .* was 4 in the checkpoint and is 2: taken"),
    ]
    for change, words in changes:
        seen, said = losses(**resume | change)
        assert len(said) == 2 and sum(bool(re.match(words, line)) for line in said) == 1, said
        assert (seen == whole) == ("ignored" in words), change


def test_every_option_that_changes_a_step_is_among_these_settings(sums, tmp_path):
    checked = {"new_model", "lora", "quantize", "tokenizer", "optimizer", "dtype", "batch_size"}  # in other ways
    no_numbers = {"self", "gradient_checkpointing", "compile_layers", "preload", "num_workers", "cache_dir"}
    answers = {"sampling", "predict_source", "too_long", "question_batch_size"}
    others = checked | no_numbers | answers | {"validation_questions", "validation_draws"}
    data = tiny_data(sums, tmp_path)
    reported = {*_SETTINGS["model"], *_SETTINGS["data"], *data.training_encoding, *data.reading}
    for kind in (DreamModule, S1KDataModule):
        assert {*signature(kind.__init__).parameters} <= reported | others


@pytest.mark.parametrize(("before", "now", "ready"), [(4, 4, 12), (4, 8, 24), (8, 2, 4), (8, 4, 8)])
def test_progress_counts_micro_batches_of_this_run(before, now, ready):
    """12 micro-batches: 3 steps of 4; of 8, one step and a short last one."""
    counts = {"ready": 12, "completed": 12}
    progress = {"total": dict(counts), "current": dict(counts), "is_last_batch": False}
    checkpoint = {"accumulate_grad_batches": before, "loops": {"fit_loop": {"epoch_loop.batch_progress": progress}}}
    rescale_progress(checkpoint, now)
    assert progress["current"] == {"ready": ready, "completed": ready}
