"""Floating-point operations of training, and the FLOP/s that the device can do: the two sides of MFU."""

import time
from dataclasses import dataclass
from functools import cache

import torch
from torch import nn

from dream_lightning.model.modeling import DreamModel


@dataclass(frozen=True)
class TrainingCost:
    """FLOPs of one forward and backward pass."""

    per_token: int  # the linear maps of the layers
    per_pair: int  # of positions that attend to each other
    per_prediction: int  # the head, at masked positions only

    def of(self, tokens: int, pairs: int, predictions: int) -> int:
        return self.per_token * tokens + self.per_pair * pairs + self.per_prediction * predictions


def training_cost(model: DreamModel) -> TrainingCost:
    """The useful work of training this model, however its weights are stored.

    - A weight of a linear map costs 2 FLOPs a token forward, 2 backward for the gradient of its input, and 2 more for
      its own gradient if it trains.
    - Attention multiplies queries with keys and probabilities with values, 2 · D FLOPs a pair each, and twice that
      backward: 12 · D per pair and layer. Pairs are those within a document: Σ length², half of them if causal.
    - Not counted: recomputation (so checkpointing lowers MFU), padding, dequantization, norms, softmax, lookups.
    """

    def linear(module: nn.Module) -> int:
        return sum(
            m.in_features * m.out_features * (6 if m.weight.requires_grad else 4)
            for m in module.modules()
            if isinstance(m, nn.Linear)
        )

    pairs_used = 6 if model.config.causal else 12
    per_pair = pairs_used * model.config.hidden_size * model.config.num_hidden_layers
    return TrainingCost(linear(model.model.layers), per_pair, linear(model.lm_head))


@cache
def matmul_ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """The highest FLOP/s of a large matrix product, measured once in a process, in about a tenth of a second.

    Ten products of 8,192³ on a GPU (0.4 GB in bfloat16, freed afterwards), one of 512³ on a CPU.
    """
    n, products = (8192, 10) if device.type == "cuda" else (512, 1)
    generator = torch.Generator(device).manual_seed(0)  # leaves the run's random numbers unchanged
    a, b = (torch.randn(n, n, device=device, generator=generator).to(dtype) for _ in range(2))
    best, runs, until = 0.0, 0, time.perf_counter() + 0.1
    while runs < 3 or time.perf_counter() < until:
        started = time.perf_counter()
        for _ in range(products):
            a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best, runs = max(best, products * 2 * n**3 / (time.perf_counter() - started)), runs + 1
    if device.type == "cuda":
        del a, b
        torch.cuda.empty_cache()
    return best
