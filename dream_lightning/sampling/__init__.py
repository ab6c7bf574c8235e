"""Answering: the reverse process, ids in and ids out."""

from dream_lightning.sampling.params import SamplingParams
from dream_lightning.sampling.sampler import GenerationOutput, denoising_steps, diffusion_generate, reverse_process

__all__ = ["GenerationOutput", "SamplingParams", "denoising_steps", "diffusion_generate", "reverse_process"]
