"""What is refused at start-up, and folders of sharded checkpoints: whole or not there, and read without pickle."""

import errno
import pickle
import shutil
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from kill_points import killed_before
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
)
from test_module import data, module, trainer

from dream_lightning.training.checkpointing import remove_partials
from dream_lightning.training.fsdp import FSDP2Strategy, refuse_untested, rescale_progress
from dream_lightning.training.sharded_checkpoint import read_into, read_rest, write


def run(strategy, precision="32-true", clip_by=None, clip_at=1.0, accumulate=1):
    """As much of a trainer as is looked at, for strategies and precisions that a CPU cannot have."""
    return SimpleNamespace(
        strategy=strategy.__new__(strategy),
        precision=precision,
        gradient_clip_algorithm=clip_by,
        gradient_clip_val=clip_at,
        accumulate_grad_batches=accumulate,
    )


@pytest.mark.parametrize(
    ("strategy", "instead"),
    [
        (FSDPStrategy, "trainer.strategy=fsdp2, its successor"),
        (ModelParallelStrategy, "trainer.strategy=fsdp2"),
        (DeepSpeedStrategy, "trainer.strategy=fsdp2"),
        (type("HomeMadeStrategy", (DDPStrategy,), {}), "HomeMadeStrategy, .* ddp or fsdp2"),
    ],
)
def test_untested_strategies_are_refused(strategy, instead):
    with pytest.raises(ValueError, match=instead):
        refuse_untested(run(strategy), adapted=False, quantized=False)


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ((FSDP2Strategy,), {"quantized": True}, "quantised weights .* trainer.strategy=ddp"),
        ((FSDP2Strategy,), {"compiled_answers": True}, "set model.sampling.compile=false"),
        ((FSDP2Strategy, "bf16-true"), {}, "precision is bf16-true, .* 32-true or bf16-mixed"),
        ((SingleDeviceStrategy, "bf16-true"), {"adapted": True}, "round the adapters: set it to bf16-mixed"),
        ((DDPStrategy, "16-mixed"), {}, "precision is 16-mixed, .* bf16-mixed"),
        ((SingleDeviceStrategy, "64-true"), {}, "precision is 64-true"),
        ((DDPStrategy, "32-true", "value"), {}, "gradient_clip_algorithm is value"),
        ((SingleDeviceStrategy, "32-true", "norm", -1.0), {}, "gradient_clip_val is -1.0"),
        ((SingleDeviceStrategy, "32-true", "norm", 1.0, 0), {}, "accumulate_grad_batches is 0"),
    ],
)
def test_mixed_choices_that_do_not_work_are_refused(options, kind, words):
    with pytest.raises(ValueError, match=words):
        refuse_untested(run(*options), **({"adapted": False, "quantized": False} | kind))


def test_what_is_tested_is_let_through():
    for strategy in ("auto", "ddp", "fsdp2"):
        for precision in ("32-true", "bf16-mixed"):
            real = L.Trainer(accelerator="cpu", devices=1, strategy=strategy, precision=precision, logger=False)
            refuse_untested(real, adapted=True, quantized=strategy != "fsdp2")


def test_optimisers_that_do_not_know_divided_weights_are_refused(monkeypatch):
    strategy = FSDP2Strategy()
    monkeypatch.setattr(strategy.__class__.__mro__[1], "setup_optimizers", lambda self, trainer: None)
    strategy._optimizers = [torch.optim.Adagrad([torch.zeros(1, requires_grad=True)])]
    with pytest.raises(ValueError, match=r"Adagrad, .* torch.optim.AdamW"):
        strategy.setup_optimizers(None)


def test_a_file_is_no_checkpoint_of_divided_weights(tmp_path, monkeypatch):
    strategy = FSDP2Strategy()
    monkeypatch.setattr(strategy, "broadcast", lambda path: path)
    (tmp_path / "last.ckpt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"not a sharded checkpoint, .* the strategy that saved it"):
        strategy.load_checkpoint(tmp_path / "last.ckpt")


def test_a_run_refuses_before_it_builds_anything(sums, tmp_path):
    model = module()
    with pytest.raises(ValueError, match="gradient_clip_algorithm is value"):
        trainer(tmp_path, gradient_clip_val=1.0, gradient_clip_algorithm="value").fit(model, data(sums, tmp_path))
    assert model.model is None


@pytest.mark.parametrize(("before", "now", "ready"), [(4, 4, 12), (4, 8, 24), (8, 2, 4), (8, 4, 8)])
def test_progress_counts_micro_batches_of_this_run(before, now, ready):
    """12 micro-batches: 3 steps of 4; of 8, one step and a short last one."""
    counts = {"ready": 12, "completed": 12}
    progress = {"total": dict(counts), "current": dict(counts), "is_last_batch": False}
    checkpoint = {
        "accumulate_grad_batches": before,
        "loops": {"fit_loop": {"epoch_loop.batch_progress": progress}},
    }
    rescale_progress(checkpoint, now)
    assert progress["current"] == {"ready": ready, "completed": ready}


class TestFolder:
    """One process; several are in test_distributed.py."""

    def save(self, path: Path, value: float, **meta) -> None:
        state = {"state_dict": {"w": torch.full((3,), value)}, "optimizer_0": {"param_groups": {"lr": value}}}
        write(state, {"step": value, **meta}, path, is_first=True, agree=lambda problem: problem)

    def load(self, path: Path) -> tuple[float, float]:
        state = {"state_dict": {"w": torch.zeros(3)}, "optimizer_0": {"param_groups": {"lr": 0.0}}}
        read_into(state, path)
        assert read_rest(path)["step"] == state["optimizer_0"]["param_groups"]["lr"]
        return state["state_dict"]["w"][0].item()

    def test_a_new_one_replaces_the_old_one_whole(self, tmp_path):
        path = tmp_path / "last.ckpt"
        for value in (1.0, 2.0):
            self.save(path, value)
            assert self.load(path) == value
        assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]

    @pytest.mark.parametrize("where", ["tensors", "meta"])
    def test_a_full_disk_leaves_the_old_one(self, tmp_path, monkeypatch, where):
        path = tmp_path / "last.ckpt"
        self.save(path, 1.0)

        def full(*args, **kwargs):
            raise OSError(errno.ENOSPC, "No space left on device")

        target = (
            (torch.distributed.checkpoint.FileSystemWriter, "write_data") if where == "tensors" else (torch, "save")
        )
        with monkeypatch.context() as patch:
            patch.setattr(*target, full)
            with pytest.raises(ValueError, match=r"last.ckpt was not saved: .*No space left.*--ckpt_path last"):
                self.save(path, 2.0)
        assert self.load(path) == 1.0
        assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]

    def test_a_kill_at_any_moment_leaves_one(self, tmp_path):
        """`--ckpt_path last` takes the newest of what is called last*.ckpt, by the time of its last change."""
        for moment in count():
            folder = tmp_path / str(moment)
            path = folder / "last.ckpt"
            self.save(path, 1.0)
            killed = killed_before(moment, folder, lambda path=path: self.save(path, 2.0))
            newest = max(folder.glob("last*.ckpt"), key=lambda p: p.stat().st_mtime_ns)
            assert self.load(newest) in (1.0, 2.0)
            again = killed_before(moment, folder, lambda path=path: self.save(path, 3.0))  # and once more
            newest = max(folder.glob("last*.ckpt"), key=lambda p: p.stat().st_mtime_ns)
            assert self.load(newest) in (1.0, 2.0, 3.0)
            self.save(path, 4.0)
            remove_partials(folder)
            assert self.load(path) == 4.0
            assert [p.name for p in folder.iterdir()] == ["last.ckpt"]
            if not (killed or again):
                break
        assert moment > 10

    def test_code_in_a_checkpoint_is_not_run(self, tmp_path):
        class Attack:
            def __reduce__(self):
                return (Path.touch, (tmp_path / "owned",))

        self.save(tmp_path / "a.ckpt", 1.0)
        (tmp_path / "a.ckpt" / ".metadata").write_bytes(pickle.dumps(Attack()))
        with pytest.raises(ValueError, match=r"names pathlib\.Path\.touch|names builtins.getattr"):
            self.load(tmp_path / "a.ckpt")
        state = {"optimizer_0": {"lr": Attack()}}
        torch.distributed.checkpoint.save(state, checkpoint_id=tmp_path / "b.ckpt")
        with pytest.raises(ValueError, match=r"[Ww]eights.only"):
            read_into({"optimizer_0": {"lr": 0.0}}, tmp_path / "b.ckpt")
        self.save(tmp_path / "c.ckpt", 1.0, attack=Attack())
        with pytest.raises(ValueError, match="damaged"):
            read_rest(tmp_path / "c.ckpt")
        assert not (tmp_path / "owned").exists()

    def test_other_things_are_refused(self, tmp_path):
        with pytest.raises(ValueError, match="no sharded checkpoint"):
            read_rest(tmp_path)
        self.save(tmp_path / "a.ckpt", 1.0)
        with pytest.raises(ValueError, match="does not fit"):
            read_into({"state_dict": {"w": torch.zeros(4)}}, tmp_path / "a.ckpt")
        shutil.copytree(tmp_path / "a.ckpt", tmp_path / "torn.ckpt")
        for file in (tmp_path / "torn.ckpt").glob("*.distcp"):
            file.write_bytes(file.read_bytes()[:100])
        with pytest.raises(ValueError, match="damaged"):
            self.load(tmp_path / "torn.ckpt")
