"""What training adds up on the device, so that the process waits for it only where something is logged."""

import torch
from torch import Tensor

from dream_lightning.batch import Batch, LossTerms, NoisedBatch

QUARTILES = 4


class StepAccumulator:
    """The running sums of one process: of an optimiser step, of the token losses by t, of the work done."""

    def __init__(self, device: torch.device) -> None:
        self._step = torch.zeros(4, device=device)
        self._quartiles = torch.zeros(2, QUARTILES, device=device)
        self._work = torch.zeros(3, dtype=torch.int64, device=device)

    @torch.no_grad()
    def add(self, batch: Batch, noised: NoisedBatch, nll: Tensor, terms: LossTerms) -> None:
        """One micro-batch, its token losses [M] and what the objective made of them."""
        self._step += torch.stack([terms.sum, terms.count, noised.is_masked.sum(), batch.maskable.sum()])
        quartile = (noised.t[noised.where] * QUARTILES).long().clamp(max=QUARTILES - 1)  # [M]
        self._quartiles[0].index_add_(0, quartile, nll)
        self._quartiles[1].index_add_(0, quartile, torch.ones_like(nll))
        real = batch.document_ids >= 0
        # A document of n tokens has positions 0 … n − 1 and n² pairs: the sum of 2p + 1.
        self._work[:2] += torch.stack([real.sum(), ((2 * batch.position_ids + 1) * real).sum()])
        self._work[2] += nll.numel()

    def take_step(self) -> Tensor:
        """[4]: loss sum, loss count, masked, maskable tokens since this was asked last."""
        taken, self._step = self._step, torch.zeros_like(self._step)
        return taken

    def take_quartiles(self) -> Tensor:
        """[2, 4]: nll sum and tokens by quarter of t, since this was asked last."""
        taken, self._quartiles = self._quartiles, torch.zeros_like(self._quartiles)
        return taken

    def work(self) -> tuple[int, int, int]:
        """Tokens, pairs of attending positions and predictions since training started; makes the device wait."""
        tokens, pairs, predictions = self._work.tolist()
        return tokens, pairs, predictions
