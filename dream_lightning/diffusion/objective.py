"""The loss of noised rows: a sum and a count, divided once per optimizer step."""

from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from dream_lightning.batch import LossTerms
from dream_lightning.errors import UserError, check_range

Normalizer = Literal["maskable", "masked", "micro_batch"]


def check_focal(alpha: float, gamma: float) -> None:
    """Raise UserError for a focal reweighting out of its range."""
    check_range("focal_alpha", alpha)
    check_range("focal_gamma", gamma)
    if alpha <= 0 or gamma < 0:
        raise UserError(f"focal_alpha is {alpha} and focal_gamma {gamma}: wanted above 0, and at least 0 (0 is none)")


def masked_nll_loss(logits: Tensor, targets: Tensor, weight: Tensor, **options: Any) -> LossTerms:
    """Weighted cross-entropy of the masked tokens, not yet divided.

    Args:
        logits: [M, V] of any float dtype, row m predicting `targets[m]`: x_t's masked positions after Dream's shift.
        targets: [M] int64, x_0 at these positions.
        weight: [M] float32, see `token_weights`.
        options: of `reduce_nll`.
    """
    return reduce_nll(F.cross_entropy(logits.float(), targets, reduction="none"), weight, **options)


def reduce_nll(
    nll: Tensor,
    weight: Tensor,
    *,
    masked_count: Tensor | int | None = None,
    maskable_count: Tensor | int | None = None,
    normalizer: Normalizer = "maskable",
    focal_alpha: float = 1.0,
    focal_gamma: float = 0.0,
) -> LossTerms:
    """Token losses → sum and count. If nothing is masked, the sum is 0 and so is every gradient.

    | normalizer    | the sum is divided by                                                            |
    |---------------|----------------------------------------------------------------------------------|
    | `maskable`    | the step's maskable tokens: with weight 1/t the ELBO in nats per token           |
    | `masked`      | the step's masked tokens                                                         |
    | `micro_batch` | each micro-batch by its own masked tokens, then by the number of micro-batches:  |
    |               | the authors' trainer; depends on how a step is split into micro-batches          |

    Args:
        nll: float32, [M] of the masked tokens, or [B, L] with 0 at the others.
        weight: float32 in the same shape.
        masked_count: number of masked tokens, for `masked` and `micro_batch`; of an nll [M] it is known.
        maskable_count: number of maskable positions of these rows, for `maskable`.
        focal_alpha, focal_gamma: multiply each token by alpha · (1 − exp(−nll))^gamma (the authors' yaml: 0.25 and 2);
            gamma 0 disables it, alpha included.

    Raises:
        UserError: an unknown normalizer, or one without its count.
    """
    if normalizer not in get_args(Normalizer):
        raise UserError(f"normalizer is {normalizer!r}, wanted one of {', '.join(get_args(Normalizer))}")
    if focal_gamma:
        # Clamped: at nll 0 the gradient of 0^gamma is infinite for gamma < 1.
        unsure = (1 - torch.exp(-nll)).clamp(min=torch.finfo(nll.dtype).tiny)
        nll = focal_alpha * unsure**focal_gamma * nll
    total = (nll * weight).sum()
    if masked_count is None and nll.dim() == 1:
        masked_count = nll.numel()
    count, name = (maskable_count, "maskable") if normalizer == "maskable" else (masked_count, "masked")
    if count is None:
        raise UserError(f"the normalizer {normalizer!r} needs {name}_count, the number of {name} tokens")
    if not isinstance(count, Tensor):
        count = torch.full((), count, device=nll.device)  # not copied from the host, which would synchronize
    count = count.to(nll.device, torch.float32)
    if normalizer == "micro_batch":
        return LossTerms(total / count.clamp(min=1), torch.ones_like(count))
    return LossTerms(total, count)
