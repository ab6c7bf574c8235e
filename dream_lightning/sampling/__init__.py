"""Answering: the reverse process, ids in and ids out."""

from dream_lightning.kernels.cuda_graphs import CompiledDenoiser, release
from dream_lightning.sampling.denoise import reverse_process
from dream_lightning.sampling.generate import GenerationOutput, denoising_steps, diffusion_generate
from dream_lightning.sampling.params import SamplingParams

__all__ = [
    "CompiledDenoiser",
    "GenerationOutput",
    "SamplingParams",
    "denoising_steps",
    "diffusion_generate",
    "release",
    "reverse_process",
]
