"""Fine-tune, sample and score the Dream diffusion language model with PyTorch Lightning."""

import logging

# Set before the imports below, which log these: a CPU kernel for 4-bit products that is not used, and advertisements.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
    lambda record: "try installing [lit" not in record.getMessage()
)

from dream_lightning.data import S1KDataModule
from dream_lightning.model import DreamConfig, DreamModel, load_tokenizer
from dream_lightning.module import DreamModule
from dream_lightning.sampling import SamplingParams, diffusion_generate

__all__ = [
    "DreamConfig",
    "DreamModel",
    "DreamModule",
    "S1KDataModule",
    "SamplingParams",
    "diffusion_generate",
    "load_tokenizer",
]
