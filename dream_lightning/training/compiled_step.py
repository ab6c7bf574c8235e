"""A training step of a small model as one compiled function, from clean rows to the loss."""

from collections.abc import Callable
from functools import cached_property
from typing import Any

import lightning as L
import torch
from torch import Tensor

from dream_lightning.batch import Batch, LossTerms, NoisedBatch
from dream_lightning.diffusion.head import chunk_of


class CompiledStep:
    """`noised_loss` of a DreamModule, compiled for rows of one document each, without padding.

    The head works at all positions: to count the masked ones would synchronize with the GPU. Options are those of
    torch.compile.
    """

    def __init__(self, module: L.LightningModule, **options: Any) -> None:
        self.module, self.options = module, {"dynamic": False} | options

    def takes(self, batch: Batch) -> bool:
        """Whether the step is compiled as a whole: for `data.preload` on a GPU, if all logits fit at once."""
        module = self.module
        if not module.compile_layers or module.gradient_checkpointing or module.anneal_causal_steps:
            return False
        made_on_gpu = batch.input_ids.is_cuda and batch.host is None
        return made_on_gpu and batch.input_ids.numel() <= chunk_of(module.model.config.vocab_size)

    def __call__(self, batch: Batch) -> tuple[Batch, NoisedBatch, Tensor, LossTerms]:
        # Compiled code would compute the rotation again in every layer and row.
        position_ids = torch.arange(batch.input_ids.shape[1], device=batch.input_ids.device)[None]
        self.rotation = self.module.model.model.rotary(position_ids, self.module.weights_dtype)
        return self._compiled(batch)

    @cached_property
    def _compiled(self) -> Callable:
        return torch.compile(self.module.noised_loss, **self.options)
