"""One matrix: the loss and the gradient of every step are the same however the step is split.

Micro-batches × accumulation × ranks × workers × packing × kill-and-resume, for each objective, in float32. The first
cut of a group is the reference of the others. All cells with two ranks (gloo) run in one launch of two processes.
Every objective on packed rows is compared with the same documents in rows of their own, to 1e-6.
"""

import os
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from unittest import mock

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from material import Recorder, addition_rows, short_trainer, tiny_data, tiny_module, write_jsonl
from meeting import MeetingPoint, Program

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
            Cut(rows=8), Cut(rows=1, accumulate=8), Cut(rows=2, accumulate=4, workers=2), Cut(rows=8, killed_after=3),
            Cut(rows=8, killed_after=5), Cut(rows=8, workers=2, killed_after=6),
            Cut(rows=2, accumulate=4, killed_after=3), Cut(ranks=2, rows=4), Cut(ranks=2, rows=1, accumulate=4),
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
}  # fmt: skip
CELLS = [(o, group, cut) for o in OBJECTIVES for group, (_, cuts) in GROUPS.items() for cut in cuts[1:]]
FEW = [("8 documents a step", Cut(ranks=2, rows=1, accumulate=4)), ("an epoch a step", Cut(rows=36, packing=True))]
CELLS += [(variant, *cell) for variant in VARIANTS for cell in FEW]


class Killed(Exception):
    """Takes the place of the end of a process."""


class Killer(Callback):
    """Raises Killed after some optimizer steps."""

    def __init__(self, after: int) -> None:
        self.after = after

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.after:
            raise Killed


def compute(folder: Path, objective: str, group: str, cut: Cut) -> tuple[list[float], list[torch.Tensor]]:
    """Losses and gradients of the steps of a training run that is split like this."""
    steps, _ = GROUPS[group]
    checkpoints = folder / f"{objective} {group} {cut}".replace("/", "")

    def fit(*callbacks: Callback, ckpt_path: Path | None = None) -> Recorder:
        # Not Adam, which turns the rounding of gradients near zero into whole steps.
        sgd = {"optimizer": lambda groups: torch.optim.SGD(groups, lr=0.05, momentum=0.9)}
        model, recorder = tiny_module(**sgd, **(OBJECTIVES | VARIANTS)[objective]), Recorder()
        options = {"batch_size": cut.rows, "num_workers": cut.workers, "packing": cut.packing, "max_length": 256}
        data = tiny_data(folder / "sums.jsonl", folder, **options)
        options = {"devices": cut.ranks, "strategy": "ddp" if cut.ranks > 1 else "auto"}
        options |= {"max_steps": steps, "accumulate_grad_batches": cut.accumulate}
        trainer = short_trainer(folder, recorder, *callbacks, **options)
        with pytest.raises(Killed) if callbacks else nullcontext():
            trainer.fit(model, data, ckpt_path=ckpt_path, weights_only=True)
        return recorder

    if cut.killed_after is None:
        recorder = fit()
        return recorder.losses, recorder.gradients
    every_step = ModelCheckpoint(checkpoints, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    before = fit(Killer(cut.killed_after), every_step)
    after = fit(ckpt_path=checkpoints / f"step={cut.killed_after}.ckpt")
    return before.losses + after.losses, before.gradients + after.gradients


def rank_main(rank: int, folder: Path, meeting: dict[str, str]) -> None:
    """One of the two processes: every cell with two ranks, as torchrun would start it."""
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
    for rank in [Program(rank_main, rank, folder, meeting.environment) for rank in (0, 1)]:
        rank.end()
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


@pytest.mark.parametrize(
    "objective",
    [
        {"weighting": "original"}, {"weighting": "original", "normalizer": "masked"},
        {"weighting": "original", "normalizer": "micro_batch"}, {"weighting": "linear"}, {"weighting": "cart"},
        {"weighting": "cart", "cart_p": 0.8, "focal_gamma": 2.0}, {"weighting": "none", "treat_eos_as_one": True},
        {"weighting": "cart", "treat_eos_as_one": True, "stratified_t": False},
        {"weighting": "original", "complementary_masks": True},
    ],
    ids=str,
)  # fmt: skip
def test_packed_equals_unpacked(folder, objective):
    module = tiny_module(**objective)
    module.configure_model()
    results = []
    for packing in (False, True):
        options = {"max_length": 256, "eos_fill_to": 60, "extra_weight": {"carry": 2.0}}
        data = tiny_data(folder / "sums.jsonl", folder, batch_size=1000, packing=packing, **options)
        data.setup("fit")
        batch = next(iter(data.train_dataloader()))
        documents = int(((batch.position_ids == 0) & (batch.document_ids >= 0)).sum())
        assert (documents > len(batch.input_ids)) == packing
        batch, noised = module.training_noise(batch)
        loss = module.loss(batch, noised, module.masked_nll(batch, noised)).mean
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(module.model.parameters()))])
        results.append((loss.detach(), gradient, int(noised.is_masked.sum())))
    (loss, gradient, masked), (packed_loss, packed_gradient, packed_masked) = results
    assert masked == packed_masked > 100
    assert abs(packed_loss - loss) <= 1e-6 * loss
    assert (packed_gradient - gradient).norm() <= 1e-6 * gradient.norm()
