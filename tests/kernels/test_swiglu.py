"""SwiGLU as one kernel against plain code: on a GPU, else by triton's interpreter in a process of its own."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F


def compare(device):
    """Sizes that fill no tile; more rows of tiles than go together."""
    from dream_lightning.kernels.swiglu import swiglu

    generator = torch.Generator().manual_seed(0)
    for length, size, width in ((1, 8, 16), (130, 72, 264), (1200, 64, 136)):
        for dtype in (torch.float16, torch.bfloat16)[: 2 if device == "cuda" else 1]:  # it multiplies no bfloat16
            x, gate, up = (
                torch.randn(shape, generator=generator).to(device, dtype)
                for shape in ((length, size), (width, size), (width, size))
            )
            exact = F.silu(x.double() @ gate.double().T) * (x.double() @ up.double().T)
            plain = F.silu(F.linear(x, gate).float()) * F.linear(x, up).float()
            error, of_plain = ((y.double() - exact).abs().max() for y in (swiglu(x, gate, up), plain.to(dtype)))
            assert error <= 1.5 * of_plain, (error, of_plain)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_it_equals_plain_code():
    if not torch.cuda.is_available():
        env = os.environ | {"TRITON_INTERPRET": "1"}
        subprocess.run([sys.executable, __file__], env=env, check=True)
    elif torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs a GPU of compute capability 9.0")
    else:
        compare("cuda")


if __name__ == "__main__":
    compare("cpu")
