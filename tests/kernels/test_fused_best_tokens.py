"""The kernel for best tokens against plain code: on a GPU, else by triton's interpreter in a process of its own."""

import importlib.util
import math
import os
import subprocess
import sys

import pytest
import torch

from dream_lightning.sampling.token_sampling import best_tokens, confidence_of


def compare(device):
    """Ties, forbidden tokens, −inf and what is no number; several blocks, and the last one not full."""
    from dream_lightning.kernels import fused_best_tokens as fused

    generator = torch.Generator().manual_seed(0)
    for size in (37, 264, 20_000):
        for dtype in (torch.float32, torch.bfloat16):
            logits = 4 * torch.randn(6, size, generator=generator)
            logits[1, 10] = logits[1, 20] = 30.0  # the first of a tie
            logits[2] = 0.5
            logits[3, : size // 2] = -math.inf
            logits[4, : size - 1] = -math.inf  # a whole block before the first number
            logits = logits.to(device, dtype)
            for forbidden in (None, 10):
                for alg in ("entropy", "maskgit_plus"):
                    tokens, confidences = fused.best_tokens(logits, alg, forbidden)
                    plain_tokens, plain = best_tokens(logits, alg, forbidden)
                    assert torch.equal(tokens, plain_tokens)
                    exact = logits.double()
                    if forbidden is not None:
                        exact[:, forbidden] = -math.inf
                    exact = confidence_of(exact.softmax(-1), tokens, alg)
                    error, of_plain = ((x - exact).abs().max() for x in (confidences, plain))
                    assert error <= 2 * of_plain + 1e-6, (error, of_plain)
    logits = torch.randn(4, 264, generator=generator)
    logits[0, 5], logits[1], logits[2, 7] = math.nan, -math.inf, math.inf
    for alg in ("entropy", "maskgit_plus"):
        tokens, confidences = fused.best_tokens(logits.to(device), alg)
        assert confidences.isnan().tolist() == [True, True, True, False]
        assert ((tokens >= 0) & (tokens < 264)).all()
    assert fused.best_tokens(logits[:0].to(device), "entropy")[0].shape == (0,)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_it_equals_plain_code():
    if torch.cuda.is_available():
        compare("cuda")
    else:
        env = os.environ | {"TRITON_INTERPRET": "1"}
        subprocess.run([sys.executable, __file__], env=env, check=True)


if __name__ == "__main__":
    compare("cpu")
