"""Fine-tune, sample and score the Dream diffusion language model with PyTorch Lightning."""
