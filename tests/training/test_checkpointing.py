"""Checkpoint files that are whole or not there."""

import resource
import signal
import tracemalloc
from contextlib import contextmanager
from functools import partial
from itertools import count

import lightning as L
import pytest
import torch
from kill_points import killed_before
from lightning.fabric.plugins.io import TorchCheckpointIO

from dream_lightning.training import checkpointing as saving
from dream_lightning.training.checkpointing import SafeCheckpointIO, remove_partials

OLD, NEW = {"step": 1, "weight": torch.ones(4)}, {"step": 2, "weight": torch.ones(1_000_000)}


@contextmanager
def files_up_to(size: int):
    """As on a disk with this much room: writing beyond it fails with an OSError."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


@pytest.fixture
def path(tmp_path):
    SafeCheckpointIO().save_checkpoint(OLD, tmp_path / "checkpoints" / "last.ckpt")
    return tmp_path / "checkpoints" / "last.ckpt"


def step(path):
    return torch.load(path, weights_only=True)["step"]


def test_it_replaces_the_file_and_leaves_nothing_else(path):
    assert step(path) == 1
    SafeCheckpointIO().save_checkpoint(NEW, path)
    assert step(path) == 2
    assert [p.name for p in path.parent.iterdir()] == ["last.ckpt"]


def test_a_full_disk_is_an_error_and_the_previous_file_stays(path):
    with files_up_to(1_000_000), pytest.raises(ValueError) as error:
        SafeCheckpointIO().save_checkpoint(NEW, path)
    text = str(error.value)
    assert "last.ckpt was not saved: File too large. It needs about 4 MiB, and " in text
    assert "the one before it is still there" in text and "--ckpt_path last" in text
    assert step(path) == 1
    assert [p.name for p in path.parent.iterdir()] == ["last.ckpt"]


def test_the_first_save_of_a_run_may_fail_too(tmp_path):
    with files_up_to(1_000_000), pytest.raises(ValueError, match="earlier checkpoints are untouched"):
        SafeCheckpointIO().save_checkpoint(NEW, tmp_path / "step=2.ckpt")
    assert not any(tmp_path.iterdir())


def test_other_errors_are_not_taken_for_a_full_disk(path):
    def explode(*_):
        raise RuntimeError("something else")

    class Exploding:
        __reduce__ = explode

    with pytest.raises(RuntimeError, match="something else"):
        SafeCheckpointIO().save_checkpoint({"x": Exploding()}, path)
    assert step(path) == 1 and len(list(path.parent.iterdir())) == 1


def test_it_is_on_the_disk_before_it_takes_the_name(path, monkeypatch):
    """A power cut after the renaming must not find an empty file under the good name."""
    events = []
    for name in ("fsync", "replace"):
        call = getattr(saving.os, name)
        monkeypatch.setattr(saving.os, name, lambda *a, call=call, name=name: (events.append(name), call(*a))[1])
    SafeCheckpointIO().save_checkpoint(NEW, path)
    assert events == ["fsync", "replace", "fsync"]


def test_a_kill_at_any_moment_leaves_the_old_or_the_new_one(path):
    for moment in count():
        killed = killed_before(moment, path.parent, lambda: SafeCheckpointIO().save_checkpoint(NEW, path))
        assert step(path) == (1 if moment < 2 else 2)  # opened, renamed
        remove_partials(path.parent)
        assert [p.name for p in path.parent.iterdir()] == ["last.ckpt"]
        if not killed:
            break
    assert moment >= 2


def test_it_is_written_without_a_copy_in_memory(path):
    """Lightning's own way holds the whole file in memory, twice."""
    peaks = []
    for io in (SafeCheckpointIO(), TorchCheckpointIO()):
        tracemalloc.start()
        io.save_checkpoint(NEW, path)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[0] < 100_000 and peaks[1] > 4_000_000


def test_what_cannot_be_read_is_an_error_for_users(path, tmp_path):
    """Such as the folder of a sharded run, with the strategy of one device."""
    read = partial(SafeCheckpointIO().load_checkpoint, weights_only=True)
    assert read(path)["step"] == 1
    with pytest.raises(ValueError, match="is a folder, as trainer"):
        read(path.parent)
    with pytest.raises(ValueError, match="does not exist"):
        read(tmp_path / "none.ckpt")
    for content in (path.read_bytes()[:300], b"", b"text"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="is not whole, or no checkpoint"):
            read(path)


def test_urls_are_left_to_lightning():
    SafeCheckpointIO().save_checkpoint(OLD, "memory://runs/last.ckpt")
    assert SafeCheckpointIO().load_checkpoint("memory://runs/last.ckpt", weights_only=True)["step"] == 1


def test_partial_files_are_removed_and_nothing_else(path):
    (path.parent / "last.ckpt.partial").write_text("torn")
    (path.parent / ".last.ckpt.partial").mkdir()
    (path.parent / ".last.ckpt.partial" / "__0_0.distcp").write_text("torn")
    assert [p.name for p in remove_partials(path.parent)] == [".last.ckpt.partial", "last.ckpt.partial"]
    assert [p.name for p in path.parent.iterdir()] == ["last.ckpt"]
    assert remove_partials(path.parent / "not there") == []


def test_tensors_that_share_memory_are_counted_once():
    weight = torch.ones(100)
    assert saving.tensor_bytes({"a": weight, "b": [weight, {"c": weight[:10]}], "d": 3}) == 400


def test_training_stops_at_a_full_disk_and_goes_on_where_there_is_room(tmp_path, sums):
    """Through the trainer: the error reaches the user, and --ckpt_path last finds the last whole file."""
    from test_module import data, module

    from dream_lightning.training import Autosave

    def fit(size, ckpt_path=None):
        autosave = Autosave(tmp_path / "checkpoints", every_n_train_steps=2, save_top_k=0, save_last=True)
        options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = L.Trainer(
            accelerator="cpu", max_steps=6, callbacks=[autosave], plugins=[SafeCheckpointIO()], **options
        )
        model = module()

        class Fill(L.Callback):
            def on_train_batch_start(self, trainer, *args):
                if trainer.global_step == 3 and size:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

        trainer.callbacks.insert(0, Fill())
        trainer.fit(model, data(sums, tmp_path), ckpt_path=ckpt_path, weights_only=True)
        return model

    whole = fit(None)
    (tmp_path / "checkpoints" / "last.ckpt").unlink()
    with files_up_to(resource.getrlimit(resource.RLIMIT_FSIZE)[0]), pytest.raises(ValueError, match="was not saved"):
        fit(10_000)
    assert torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 2
    resumed = fit(None, "last")
    for p, q in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q)
