"""Training synchronizes with its GPU only where it logs: on a GPU, and on a CPU that simulates one."""

from dataclasses import replace
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers.logger import DummyLogger
from material import short_trainer, tiny_data
from material import tiny_module as module
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakTensorKeyDictionary

from dream_lightning import DreamModule
from dream_lightning.batch import Batch, NoisedBatch
from dream_lightning.training import ProgressBar, Throughput, progress

ACCUMULATE, LOG_EVERY = 2, 3
OPTIONS = [{}, {"complementary_masks": True, "treat_eos_as_one": True}, {"weighting": "cart", "focal_gamma": 2.0}]


def data(source, tmp_path, **options):
    return tiny_data(source, tmp_path, **{"max_length": 200, "batch_size": 1, "validation_questions": 0} | options)


def trainer(tmp_path, *callbacks, **options):
    steps = {"limit_train_batches": 4 * ACCUMULATE, "max_steps": 8, "accumulate_grad_batches": ACCUMULATE}  # two epochs
    steps |= {"gradient_clip_val": 1.0, "log_every_n_steps": LOG_EVERY, "logger": DummyLogger()}
    return short_trainer(tmp_path, *callbacks, **steps | {"enable_progress_bar": True} | options)


class SimulatedGPU(TorchDispatchMode, L.Callback):
    """Takes weights and moved batches for tensors of a GPU, and records the micro-batches that synchronize with it."""

    def __init__(self):
        super().__init__()
        self.tensors, self.synchronized = WeakTensorKeyDictionary(), set()
        self.micro_batch = 0  # from 1, until the epoch ends

    def take(self, x):
        self.tensors[x] = True
        return x

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, out = func.overloadpacket.__name__, func(*args, **(kwargs or {}))
        if any(isinstance(x, Tensor) and x in self.tensors for x in tree_leaves((args, kwargs))):
            tree_map_only(Tensor, self.take, out)
            by_mask = "index" in name and any(getattr(i, "dtype", None) == torch.bool for i in tree_leaves(args[1]))
            if self.micro_batch and (by_mask or name in ("_local_scalar_dense", "nonzero", "masked_select", "equal")):
                self.synchronized.add(self.micro_batch)
        return out

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.micro_batch = trainer.global_step * ACCUMULATE + batch_idx % ACCUMULATE + 1
        if self.micro_batch == 1:
            for x in [*pl_module.parameters(), *vars(pl_module.totals).values()]:
                self.take(x)

    def on_train_epoch_end(self, trainer, pl_module):
        self.micro_batch = 0


@pytest.fixture
def gpu(monkeypatch):
    """A CPU that simulates a GPU."""
    simulated = SimulatedGPU()

    def sent(x):
        return simulated.take(x.clone())

    def send(batch, device):
        moved = replace(batch, **{name: sent(x) for name, x in batch.tensors().items()})
        moved.host = batch, {}
        return moved

    def send_noised(noised, device):
        moved = NoisedBatch(sent(noised.x_t), sent(noised.is_masked), sent(noised.t))
        moved.where = tuple(map(sent, noised.where))
        return moved

    monkeypatch.setattr(Batch, "to", send)
    monkeypatch.setattr(NoisedBatch, "to", send_noised)
    arrived = SimpleNamespace(value=0.0, done=lambda: True)  # does not synchronize
    monkeypatch.setattr(progress, "_AsyncCopy", lambda number: arrived)
    return simulated


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("packing", [False, True])
def test_training_synchronizes_only_where_it_logs(sums, tmp_path, gpu, monkeypatch, options, packing):
    """Lightning's loops, hooks, the optimizer's step, callbacks and the bar."""
    log, numbers = DreamModule.log, []  # numbers: Lightning would copy them to the GPU and synchronize

    def watched(model, name, value, **kwargs):
        numbers.extend([] if isinstance(value, Tensor) else [name])
        log(model, name, value, **kwargs)

    monkeypatch.setattr(DreamModule, "log", watched)
    fit = trainer(tmp_path, gpu, Throughput(), ProgressBar())
    with gpu:
        fit.fit(module(**options), data(sums, tmp_path, packing=packing))
    assert fit.global_step == 8 and gpu.synchronized == {3 * ACCUMULATE, 6 * ACCUMULATE} and not numbers


def test_another_bar_synchronizes_once_a_step_and_shows_the_loss(sums, tmp_path, gpu):
    fit = trainer(tmp_path, gpu, TQDMProgressBar(), log_every_n_steps=0)
    cpu = Tensor.cpu
    with gpu, pytest.MonkeyPatch.context() as patch:
        # A simulated GPU is on the CPU already.
        patch.setattr(Tensor, "cpu", lambda x: torch.tensor(x.item()) if x in gpu.tensors and x.dim() == 0 else cpu(x))
        fit.fit(module(), data(sums, tmp_path))
    assert gpu.synchronized == {ACCUMULATE * step for step in range(1, 9)}
    assert fit.progress_bar_metrics["train/loss"] > 0


def test_what_a_hook_changes_is_not_masked(sums, tmp_path, gpu):
    class Spares(DreamModule):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            return replace(batch, maskable=batch.maskable & (batch.position_ids % 2 == 1))

        def training_step(self, batch, batch_idx):
            assert not self.training_noise(batch)[1].is_masked[:, ::2].any()
            return super().training_step(batch, batch_idx)

    trainer(tmp_path, enable_progress_bar=False).fit(module(Spares), data(sums, tmp_path))


@pytest.mark.gpu
@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize(
    "options", [*OPTIONS, {"stratified_t": False}, {"complementary_masks": True, "stratified_t": False}], ids=str
)
def test_the_noise_is_the_same_on_a_gpu(sums, tmp_path, packing, options):
    model, rows = module(**options), data(sums, tmp_path, packing=packing, batch_size=4, eos_fill_to=60)
    rows.setup("fit")
    batch = next(iter(rows.train_dataloader()))
    moved = batch.to("cuda")
    assert batch.input_ids.is_pinned() and moved.on_host is batch
    rows, from_host = model.training_noise(moved)
    moved.maskable = moved.maskable.clone()
    assert moved.on_host is moved
    _, from_gpu = model.training_noise(moved)
    assert rows.input_ids.is_cuda and from_host.x_t.is_cuda
    for name in ("x_t", "is_masked", "t"):
        assert torch.equal(getattr(from_gpu, name), getattr(from_host, name)), name
    assert all(map(torch.equal, from_gpu.where, from_host.where))


class RaiseWhereItSynchronizes(L.Callback):
    """In some optimizer steps, by torch itself."""

    seen = 0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        step = trainer.global_step + 1
        watches = step in (4, 5, 7)  # the first three warm up, the sixth logs, the eighth ends the run
        torch.cuda.set_sync_debug_mode("error" if watches else "default")
        self.seen += watches

    def on_train_epoch_end(self, *args):
        torch.cuda.set_sync_debug_mode("default")

    on_exception = on_train_epoch_end


@pytest.mark.gpu
@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_training_on_a_gpu_synchronizes_only_where_it_logs(sums, tmp_path, packing, options):
    raises, gpu = RaiseWhereItSynchronizes(), {"accelerator": "gpu", "devices": 1, "precision": "bf16-mixed"}
    fit = trainer(tmp_path, raises, Throughput(), ProgressBar(), **gpu)
    fit.fit(module(**options), data(sums, tmp_path, packing=packing))
    assert fit.global_step == 8 and raises.seen == 3 * ACCUMULATE
