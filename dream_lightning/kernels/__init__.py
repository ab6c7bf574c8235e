"""Faster ways to compute the same on CUDA. Optional: the core runs without this folder."""
