"""Fine-tune, sample and score the Dream diffusion language model with PyTorch Lightning."""

from dream_lightning import quiet  # noqa: F401 (first of all)
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
