"""The loss of a noised row: a sum and a count, divided once an optimiser step."""

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from dream_lightning.batch import LossTerms
from dream_lightning.errors import UserError

Normalizer = Literal["maskable", "masked", "micro_batch"]


def masked_nll_loss(
    logits: Tensor,
    targets: Tensor,
    weight: Tensor,
    *,
    maskable_count: Tensor | int | None = None,
    normalizer: Normalizer = "maskable",
    focal_alpha: float = 1.0,
    focal_gamma: float = 0.0,
) -> LossTerms:
    """Weighted cross-entropy of the masked tokens, not yet divided.

    Args:
        logits: [M, V] any float dtype, row m predicting `targets[m]`: x_t's masked positions after Dream's shift.
        targets: [M] int64, x_0 there.
        weight: [M] float32, see `token_weights`.
        maskable_count: maskable positions of these rows; needed by the normaliser `maskable`.
        normalizer, focal_alpha, focal_gamma: see `reduce_nll`.
    """
    nll = F.cross_entropy(logits.float(), targets, reduction="none")  # [M]
    return reduce_nll(
        nll,
        weight,
        maskable_count=maskable_count,
        normalizer=normalizer,
        focal_alpha=focal_alpha,
        focal_gamma=focal_gamma,
    )


def reduce_nll(
    nll: Tensor,
    weight: Tensor,
    *,
    maskable_count: Tensor | int | None = None,
    normalizer: Normalizer = "maskable",
    focal_alpha: float = 1.0,
    focal_gamma: float = 0.0,
) -> LossTerms:
    """Token losses [M] → sum and count. With M = 0 both are 0 and so is every gradient.

    | normaliser    | the sum is divided by                                                            |
    |---------------|----------------------------------------------------------------------------------|
    | `maskable`    | the step's maskable tokens: with weight 1/t the ELBO in nats a token             |
    | `masked`      | the step's masked tokens                                                         |
    | `micro_batch` | each micro-batch by its own masked tokens, then by the number of micro-batches:  |
    |               | the authors' trainer; depends on how a step is cut into micro-batches            |

    Focal reweighting multiplies each token by alpha · (1 − exp(−nll))^gamma (the authors' yaml: 0.25 and 2); gamma 0
    switches it off, alpha included.
    """
    if normalizer not in get_args(Normalizer):
        raise UserError(f"normalizer is {normalizer!r}, wanted one of {', '.join(get_args(Normalizer))}")
    if focal_gamma:
        # Not below the smallest float: at a certain token (nll 0) the gradient of 0^gamma is infinite for gamma < 1.
        unsure = (1 - torch.exp(-nll)).clamp(min=torch.finfo(nll.dtype).tiny)
        nll = focal_alpha * unsure**focal_gamma * nll
    total = (nll * weight).sum()
    masked_count = torch.full((), nll.numel(), dtype=torch.float32, device=nll.device)
    match normalizer:
        case "masked":
            return LossTerms(total, masked_count)
        case "micro_batch":
            return LossTerms(total / masked_count.clamp(min=1), torch.ones_like(masked_count))
    if maskable_count is None:
        raise UserError("the normaliser 'maskable' needs maskable_count, the number of maskable positions")
    return LossTerms(total, torch.as_tensor(maskable_count, dtype=torch.float32, device=nll.device))
