"""Answering: the reverse process, ids in and ids out."""

from dream_lightning.sampling.generate import GenerationOutput, denoising_steps, diffusion_generate, release_compiled
from dream_lightning.sampling.params import SamplingParams
from dream_lightning.sampling.variable_length import infill_variable_length

__all__ = [
    "GenerationOutput",
    "SamplingParams",
    "denoising_steps",
    "diffusion_generate",
    "infill_variable_length",
    "release_compiled",
]
