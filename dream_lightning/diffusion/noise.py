"""Stateless random numbers: a number is a hash of its address (seed, epoch, sample, position, …).

So batch size, ranks, workers, packing, kill and resume cannot change it, and CPU and GPU give the same bits.
"""

import torch
from torch import Tensor


def uniform(seed: int, *keys: Tensor | int) -> Tensor:
    """Uniform numbers in [0, 1), a pure function of `seed` and the integer keys.

    Args:
        seed: any int64.
        keys: integers or int64 tensors that broadcast together, at least one a tensor. Their order matters.

    Returns:
        float32 in the keys' broadcast shape and on their device, multiples of 2⁻²⁴.

    Each key is mixed in by the finalizer of SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number
    generators", 2014), in int64 arithmetic that wraps around.
    """
    device = next(key.device for key in keys if isinstance(key, Tensor))
    state = _on(device, _wrap(seed))
    for key in keys:
        state = _mix((state + _GOLDEN_GAMMA) ^ _mix(_on(device, key) + _GOLDEN_GAMMA))
    return _shift_right(state, 40).float() * 2.0**-24


def _on(device: torch.device, key: Tensor | int) -> Tensor:
    """The key as int64. An integer is filled in on the device: copying it there would synchronize with the GPU."""
    if isinstance(key, Tensor):
        return key.to(device, torch.int64)
    return torch.full((), key, dtype=torch.int64, device=device)


def _wrap(value: int) -> int:
    """The unsigned 64-bit pattern of a Python integer as int64."""
    value &= 2**64 - 1
    return value - 2**64 if value >= 2**63 else value


_GOLDEN_GAMMA = _wrap(0x9E3779B97F4A7C15)
_MULTIPLIER_1 = _wrap(0xBF58476D1CE4E5B9)
_MULTIPLIER_2 = _wrap(0x94D049BB133111EB)


def _shift_right(z: Tensor, bits: int) -> Tensor:
    """Logical shift: torch's own is arithmetic."""
    return (z >> bits) & (2 ** (64 - bits) - 1)


def _mix(z: Tensor) -> Tensor:
    z = (z ^ _shift_right(z, 30)) * _MULTIPLIER_1
    z = (z ^ _shift_right(z, 27)) * _MULTIPLIER_2
    return z ^ _shift_right(z, 31)
