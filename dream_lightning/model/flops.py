"""What training costs in floating-point operations, and what the machine can do: the two sides of MFU."""

import time
from dataclasses import dataclass

import torch
from torch import nn

from dream_lightning.model.modeling import DreamModel


@dataclass(frozen=True)
class TrainingCost:
    """FLOPs of one forward and backward, by what they grow with."""

    per_token: int  # the linear maps of the layers
    per_pair: int  # a position that attends to a position
    per_prediction: int  # the head, which runs at masked positions only

    def of(self, tokens: int, pairs: int, predictions: int) -> int:
        """FLOPs of this much work."""
        return self.per_token * tokens + self.per_pair * pairs + self.per_prediction * predictions


def training_cost(model: DreamModel) -> TrainingCost:
    """The useful work of training this model as it stands, adapters and frozen weights considered.

    - A weight of a linear map takes part in one multiplication and one addition a token: 2 FLOPs forward, 2 backward
      for the gradient of its input, and 2 more for its own gradient if it trains. So 6 a weight in full fine-tuning, 4
      a frozen weight under adapters, whether it is stored in 16 bits or in 4.
    - Attention multiplies queries with keys and probabilities with values, 2 · D FLOPs a pair each, and backward twice
      that: 12 · D a pair and layer. Pairs are those within a document: Σ length².
    - Not counted: what is computed twice (checkpointing, the head's chunks), padding, dequantisation, norms, the
      softmax, lookups. MFU is about useful work, so recomputation lowers it.

    The first layer's q, k and v need no gradient of their input where the embeddings are frozen; they are counted all
    the same, 0.4 % too much at 7B.
    """

    def linear(module: nn.Module) -> int:
        return sum(
            m.in_features * m.out_features * (6 if m.weight.requires_grad else 4)
            for m in module.modules()
            if isinstance(m, nn.Linear)
        )

    layers = model.config.num_hidden_layers
    return TrainingCost(
        per_token=linear(model.model.layers),
        per_pair=12 * model.config.hidden_size * layers,
        per_prediction=linear(model.lm_head),
    )


def matmul_ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product, measured in about a tenth of a second: the best this device can do.

    Measured, not looked up: it then holds on every GPU and CPU, with the clock and the number of threads there are. The
    best of a few runs: ten products of 8,192³ on a GPU (0.4 GB in bfloat16, given back), one of 512³ on a CPU, so short
    that other programs leave some of them alone.
    """
    n, products = (8192, 10) if device.type == "cuda" else (512, 1)
    a, b = (torch.randn(n, n, device=device, generator=_generator(device)).to(dtype) for _ in range(2))
    best, runs, until = 0.0, 0, time.perf_counter() + 0.1
    while runs < 3 or time.perf_counter() < until:  # one may meet a standstill
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


def _generator(device: torch.device) -> torch.Generator:
    """Of its own: measuring must not change the run's random numbers."""
    return torch.Generator(device).manual_seed(0)
