"""Answering: the reverse process, ids in and ids out."""

from dream_lightning.sampling.compiled import CompiledDenoiser, release
from dream_lightning.sampling.params import SamplingParams
from dream_lightning.sampling.process import reverse_process
from dream_lightning.sampling.sampler import GenerationOutput, denoising_steps, diffusion_generate

__all__ = [
    "CompiledDenoiser",
    "GenerationOutput",
    "SamplingParams",
    "denoising_steps",
    "diffusion_generate",
    "release",
    "reverse_process",
]
