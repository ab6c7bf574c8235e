"""The masking probability t of each sample."""

import math

import torch
from torch import Tensor

from dream_lightning.diffusion.noise import uniform

_GOLDEN_RATIO = (math.sqrt(5) - 1) / 2


def stratified_t(seed: int, epochs: Tensor, document_ids: Tensor, *, t_min: float = 1e-3, t_max: float = 1.0) -> Tensor:
    """t ~ U(t_min, t_max) for each sample, such that consecutive samples cover the interval evenly.

    The additive recurrence of the golden ratio, t = frac(offset(epoch) + order · φ): n consecutive values leave no gap
    wider than about 2/n, independent draws log(n)/n. The random offset of the epoch makes every single t exactly
    uniform, so expectations are those of independent draws.

    Args:
        epochs, document_ids: int64, any shape: the epoch and the sample's index in that epoch's order. Negative epochs,
            the repeated draws of a validation set, share one offset.
        t_min: lower end; it bounds the ELBO's weight 1/t.
        t_max: upper end.

    Returns:
        float32 in the shape of `document_ids`.
    """
    offset = uniform(seed, epochs.clamp(min=-1), _OFFSET).double()
    fraction = torch.frac(offset + document_ids.clamp(min=0).double() * _GOLDEN_RATIO)
    return (t_min + (t_max - t_min) * fraction).float()


def independent_t(seed: int, epochs: Tensor, sample_ids: Tensor, *, t_min: float = 1e-3, t_max: float = 1.0) -> Tensor:
    """t ~ U(t_min, t_max) independently for each sample of each epoch (the authors' choice). Shapes as above."""
    return t_min + (t_max - t_min) * uniform(seed, epochs, sample_ids, _INDEPENDENT)


# The last key of a number's address: what it is used for.
_OFFSET, _INDEPENDENT = -1, -2
