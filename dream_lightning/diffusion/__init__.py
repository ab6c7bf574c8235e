"""The mathematics of masked diffusion: pure functions on tensors."""

from dream_lightning.diffusion.corruption import corrupt, next_tokens, with_complements
from dream_lightning.diffusion.head import token_nll, token_nll_and_doubt
from dream_lightning.diffusion.objective import masked_nll_loss, reduce_nll
from dream_lightning.diffusion.schedule import independent_t, stratified_t
from dream_lightning.diffusion.weighting import token_weights

__all__ = [
    "corrupt",
    "independent_t",
    "masked_nll_loss",
    "next_tokens",
    "reduce_nll",
    "stratified_t",
    "token_nll",
    "token_nll_and_doubt",
    "token_weights",
    "with_complements",
]
