"""One matrix: the loss and the gradient of every step are the same however the step is split.

Micro-batches × accumulation × ranks × workers × packing × kill-and-resume, for each objective, in float32. The first
cut of a group is the reference of the others. All cells with two ranks (gloo) run in one launch of two processes.
"""

import multiprocessing
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from unittest import mock

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from material import addition_rows, short_trainer, tiny_data, tiny_module, write_jsonl
from meeting import MeetingPoint

pytestmark = pytest.mark.xdist_group("invariance")  # one launch of processes
TOLERANCE = 1e-5
OBJECTIVES = {"1/t": {"weighting": "original"}, "linear": {"weighting": "linear"}, "cart": {"weighting": "cart"}}
VARIANTS = {  # in a few cells only
    "1/t over masked": {"weighting": "original", "normalizer": "masked"},
    "cart over masked": {"weighting": "cart", "normalizer": "masked"},
    "1/t, complements": {"weighting": "original", "complementary_masks": True},
}


@dataclass(frozen=True)
class Cut:
    """One way to compute the same optimizer steps."""

    ranks: int = 1
    rows: int = 1  # of a micro-batch and rank
    accumulate: int = 1
    workers: int = 0
    packing: bool = False
    killed_after: int | None = None  # optimizer steps; then resumed


TO_THE_END = 1000  # micro-batches accumulated: all of an epoch
GROUPS = {
    # 36 documents are 4.5 steps of 8: an epoch ends in a half step, and the seventh step lies inside the second epoch.
    "8 documents a step": (
        7,
        [
            Cut(rows=8),
            Cut(rows=1, accumulate=8),
            Cut(rows=2, accumulate=4, workers=2),
            Cut(rows=8, killed_after=3),
            Cut(rows=8, killed_after=5),
            Cut(rows=8, workers=2, killed_after=6),
            Cut(rows=2, accumulate=4, killed_after=3),
            Cut(ranks=2, rows=4),
            Cut(ranks=2, rows=1, accumulate=4),
            Cut(ranks=2, rows=2, accumulate=2, workers=1, killed_after=3),
        ],
    ),
    # Packing decides which documents share a row, so packed and unpacked steps hold the same ones when they hold all.
    "an epoch a step": (
        2,
        [
            Cut(rows=36),
            Cut(rows=36, packing=True),
            Cut(rows=1, accumulate=TO_THE_END, packing=True),
            Cut(rows=3, accumulate=TO_THE_END, packing=True, workers=2, killed_after=1),
            Cut(ranks=2, rows=1, accumulate=TO_THE_END, packing=True),
            Cut(ranks=2, rows=2, accumulate=TO_THE_END, packing=True, killed_after=1),
        ],
    ),
    "4 packed rows a step": (
        5,
        [
            Cut(rows=4, packing=True),
            Cut(rows=1, accumulate=4, packing=True),
            Cut(rows=2, accumulate=2, packing=True, workers=2, killed_after=2),
            Cut(ranks=2, rows=1, accumulate=2, packing=True, killed_after=2),
        ],
    ),
}
CELLS = [(o, group, cut) for o in OBJECTIVES for group, (_, cuts) in GROUPS.items() for cut in cuts[1:]]
FEW = [("8 documents a step", Cut(ranks=2, rows=1, accumulate=4)), ("an epoch a step", Cut(rows=36, packing=True))]
CELLS += [(variant, *cell) for variant in VARIANTS for cell in FEW]


class Killed(Exception):
    """Takes the place of the end of a process."""


class Recorder(L.Callback):
    """Keeps the loss and the gradient of every optimizer step; raises Killed after some of them."""

    def __init__(self, killed_after=None):
        self.losses, self.gradients, self.killed_after = [], [], killed_after

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step > len(self.losses):  # not in the middle of accumulation
            self.losses.append(trainer.callback_metrics["train/loss"].item())
            gradients = [p.grad.flatten() for p in pl_module.parameters() if p.grad is not None]
            self.gradients.append(torch.cat(gradients))

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.killed_after:
            raise Killed


def compute(folder: Path, objective: str, group: str, cut: Cut) -> tuple[list[float], list[torch.Tensor]]:
    """Losses and gradients of the steps of a training run that is split like this."""
    steps, _ = GROUPS[group]
    checkpoints = folder / f"{objective} {group} {cut}".replace("/", "")

    def fit(recorder: Recorder, *, resume: bool = False) -> Recorder:
        # Not Adam, which turns the rounding of gradients near zero into whole steps.
        sgd = {"optimizer": lambda groups: torch.optim.SGD(groups, lr=0.05, momentum=0.9)}
        model = tiny_module(**sgd, **(OBJECTIVES | VARIANTS)[objective])
        options = {"batch_size": cut.rows, "num_workers": cut.workers, "packing": cut.packing, "max_length": 256}
        data = tiny_data(folder / "sums.jsonl", folder, **options)
        every_step = ModelCheckpoint(checkpoints, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        trainer = short_trainer(
            folder,
            recorder,
            *([every_step] if recorder.killed_after else []),
            **{"devices": cut.ranks, "strategy": "ddp" if cut.ranks > 1 else "auto"},
            **{"max_steps": steps, "accumulate_grad_batches": cut.accumulate},
        )
        ckpt_path = checkpoints / f"step={cut.killed_after}.ckpt" if resume else None
        trainer.fit(model, data, ckpt_path=ckpt_path, weights_only=True)
        return recorder

    if cut.killed_after is None:
        recorder = fit(Recorder())
        return recorder.losses, recorder.gradients
    before, after = Recorder(cut.killed_after), Recorder()
    with pytest.raises(Killed):
        fit(before)
    after.losses = list(before.losses)  # steps before the resumption are not recorded again
    fit(after, resume=True)
    return after.losses, before.gradients + after.gradients


def rank_main(rank: int, folder: Path, meeting: dict[str, str]) -> None:
    """One of the two processes: every cell with two ranks, as torchrun would start it."""
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # data workers would each import torch again
    os.environ |= meeting | {"TORCHELASTIC_RUN_ID": "invariance", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0"}
    results = {str(cell): compute(folder, *cell) for cell in CELLS if cell[2].ranks == 2}
    if rank == 0:
        torch.save(results, folder / "two ranks.pt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("invariance")
    write_jsonl(folder / "sums.jsonl", addition_rows(40))
    return folder


@pytest.fixture(scope="module")
def two_ranks(folder):
    meeting = MeetingPoint()
    torch.multiprocessing.spawn(rank_main, args=(folder, meeting.environment), nprocs=2)
    return torch.load(folder / "two ranks.pt", weights_only=True)


@cache
def reference(folder: Path, objective: str, group: str) -> tuple[list[float], list[torch.Tensor]]:
    return compute(folder, objective, group, GROUPS[group][1][0])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("objective", "group", "cut"), CELLS, ids=str)
def test_a_step_does_not_depend_on_how_it_is_split(request, folder, objective, group, cut):
    losses, gradients = reference(folder, objective, group)
    if cut.ranks == 2:
        others, other_gradients = request.getfixturevalue("two_ranks")[str((objective, group, cut))]
    else:
        others, other_gradients = compute(folder, objective, group, cut)
    assert len(losses) == len(others) == len(gradients) == len(other_gradients) == GROUPS[group][0]
    assert others == pytest.approx(losses, rel=TOLERANCE)
    for mine, other in zip(gradients, other_gradients, strict=True):
        assert torch.linalg.vector_norm(other - mine) <= TOLERANCE * torch.linalg.vector_norm(mine)
        assert (other - mine).abs().max() <= TOLERANCE * mine.abs().max()


def test_the_matrix_detects_another_step_and_other_noise(folder):
    """Both differ by far more than the tolerance."""
    losses, gradients = reference(folder, "1/t", "8 documents a step")
    with mock.patch.dict(OBJECTIVES, {"other seed": {"weighting": "original", "seed": 1}}):
        others, other_gradients = compute(folder, "other seed", "8 documents a step", Cut(rows=8))
    for a, b in ((losses[0], losses[1]), (losses[0], others[0])):
        assert abs(a - b) > 100 * TOLERANCE * a
    assert (gradients[0] - other_gradients[0]).norm() > 100 * TOLERANCE * gradients[0].norm()
