"""Whether a model got better: scores with intervals, comparisons, likelihoods, overlap with the training data."""

from dream_lightning.evaluation.contamination import contamination
from dream_lightning.evaluation.likelihood import nll_bound

__all__ = ["contamination", "nll_bound"]
