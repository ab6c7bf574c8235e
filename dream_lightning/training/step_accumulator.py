"""Running totals of training on the device, so that the process synchronizes with the GPU only where it logs."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from dream_lightning.batch import Batch, LossTerms, NoisedBatch
from dream_lightning.training.fsdp import local, sum_over_processes

QUARTILES = 4
# Gradients are divided by the step's token count at its end. Until then this power of two keeps them near one, exactly.
GRADIENT_SCALE = 2.0**-10


class StepAccumulator:
    """Totals of one process: of an optimizer step, of the token losses by t, and of the work done."""

    def __init__(self, device: torch.device) -> None:
        self._step = torch.zeros(4, device=device)
        self._quartiles = torch.zeros(2, QUARTILES, device=device)
        self._work = torch.zeros(3, dtype=torch.int64, device=device)

    @torch.no_grad()
    def add(self, batch: Batch, noised: NoisedBatch, nll: Tensor, terms: LossTerms) -> None:
        """Add one micro-batch, its token losses [M] and its terms of the objective."""
        self._step += torch.stack([terms.sum, terms.count, noised.is_masked.sum(), batch.maskable.sum()])
        quartile = (noised.t[noised.where] * QUARTILES).long().clamp(max=QUARTILES - 1)  # [M]
        self._quartiles[0].index_add_(0, quartile, nll)
        self._quartiles[1].index_add_(0, quartile, torch.ones_like(nll))
        real = batch.document_ids >= 0
        # A document of n tokens has positions 0 … n − 1 and n² pairs: the sum of 2p + 1.
        self._work[:2] += torch.stack([real.sum(), ((2 * batch.position_ids + 1) * real).sum()])
        self._work[2] += nll.numel()

    def take_step(self, world_size: int) -> Tensor:
        """[4]: loss sum, loss count, masked and maskable tokens of all processes since the last call."""
        taken, self._step = self._step, torch.zeros_like(self._step)
        return sum_over_processes(taken, world_size)

    def take_quartiles(self, world_size: int) -> Tensor:
        """[4] mean nll by quarter of t since the last call, over all processes; NaN without tokens."""
        taken, self._quartiles = self._quartiles, torch.zeros_like(self._quartiles)
        nll, tokens = sum_over_processes(taken, world_size)
        return nll / tokens

    def work(self) -> tuple[int, int, int]:
        """Tokens, attending pairs of positions and predictions since training started; synchronizes with the GPU."""
        return tuple(self._work.tolist())


def divide_gradients(parameters: Iterable[nn.Parameter], count: Tensor, world_size: int) -> None:
    """Divide the gradients of a step's loss sum, times GRADIENT_SCALE, by the step's count, in place."""
    factor = world_size / (GRADIENT_SCALE * count.clamp(min=1))  # strategies average over processes
    for parameter in parameters:
        if parameter.grad is not None:
            local(parameter.grad).mul_(factor)
