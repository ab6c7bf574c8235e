"""What an optimiser keeps, found by letting it make a step on parameters without memory."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from dream_lightning.errors import UserError
from dream_lightning.training.optimizer import BLOCK, AdamW8bit, decay_groups, in_8_bits

_PAGED = 100_000  # elements from which bitsandbytes pages moments


@dataclass(frozen=True)
class OptimizerMemory:
    """Bytes."""

    states: int
    """on the GPU, between steps"""
    paged: int
    """in managed memory, which moves to the host when the GPU is full and is not in torch's count"""
    temporary: int
    """more, while the optimiser steps"""


def optimizer_memory(
    make: Callable[[list[dict]], torch.optim.Optimizer], parameters: Sequence[nn.Parameter]
) -> OptimizerMemory:
    """The states of any optimiser over these parameters, in bytes.

    Args:
        make: parameter groups → optimiser, as `DreamModule` takes it.
        parameters: on the meta device; they lend their shapes and dtypes.

    Raises:
        UserError: the optimiser cannot step without real numbers, so its states cannot be counted.
    """
    shapes = [nn.Parameter(torch.empty_like(p, device="meta")) for p in parameters]
    optimizer = make(decay_groups(shapes))
    bases = type(optimizer).__mro__
    if isinstance(optimizer, AdamW8bit):  # and 16 low-order bits
        tails = sum(2 * p.numel() for p in shapes if p.dtype == torch.bfloat16)
        eight_bit = _eight_bit(shapes, moments=2, small=lambda p: not in_8_bits(p), pages=False)
        return replace(eight_bit, states=eight_bit.states + tails)
    if any(base.__module__.startswith("bitsandbytes.") for base in bases):  # its kernels need real memory
        moments = 2 if any(base.__name__ == "Optimizer2State" for base in bases) else 1
        from_size = optimizer.args.min_8bit_size if optimizer.args.optim_bits == 8 else sys.maxsize
        return _eight_bit(shapes, moments=moments, small=lambda p: p.numel() < from_size, pages=optimizer.is_paged)
    for group in optimizer.param_groups:
        group["fused"] = False  # the fused kernels, which keep the same, are for real devices
    for p in shapes:
        p.grad = torch.empty_like(p)
    try:
        optimizer.step()
    except (RuntimeError, NotImplementedError) as error:
        raise UserError(
            f"the states of {type(optimizer).__name__} cannot be counted without running it ({str(error)[:200]}): "
            "plan with torch.optim.AdamW, which keeps 8 bytes a float32 parameter"
        ) from error
    states = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor) and t.dim()]
    total = sum(t.nbytes for t in states)
    # torch's multi-tensor form, the default on a GPU, holds the root of all second moments at once; the fused does not.
    foreach = not optimizer.defaults.get("fused") and optimizer.defaults.get("foreach", False) is not False
    second = sum(s["exp_avg_sq"].nbytes for s in optimizer.state.values() if "exp_avg_sq" in s)
    return OptimizerMemory(total, 0, second if foreach else 0)


def _eight_bit(
    parameters: Sequence[nn.Parameter], *, moments: int, small: Callable[[Tensor], bool], pages: bool
) -> OptimizerMemory:
    """A moment has a byte an element and a float32 scale a block; those of small parameters 4 bytes an element."""
    states = paged = 0
    for p in parameters:
        codes, scales = (4 * p.numel(), 0) if small(p) else (p.numel(), 4 * -(-p.numel() // BLOCK))
        in_pages = pages and p.numel() >= _PAGED
        paged += moments * codes * in_pages
        states += moments * (codes * (not in_pages) + scales)
    return OptimizerMemory(states, paged, 0)
