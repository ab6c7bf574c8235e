"""The mathematics of masked diffusion: pure functions on tensors."""

from dream_lightning.diffusion.corruption import corrupt
from dream_lightning.diffusion.head import token_nll
from dream_lightning.diffusion.objective import masked_nll_loss, reduce_nll
from dream_lightning.diffusion.schedule import independent_t, stratified_t
from dream_lightning.diffusion.weighting import token_weights

__all__ = [
    "corrupt",
    "independent_t",
    "masked_nll_loss",
    "reduce_nll",
    "stratified_t",
    "token_nll",
    "token_weights",
]
