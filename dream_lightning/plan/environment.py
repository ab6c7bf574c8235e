"""What this machine has: versions, GPUs, and which kernels a run would use."""

import platform
import shutil
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import torch

from dream_lightning.model.attention import prefers_cudnn

_PACKAGES = ("torch", "lightning", "transformers", "peft", "bitsandbytes", "triton")


@dataclass(frozen=True)
class Gpu:
    """One visible GPU; memory in GiB."""

    name: str
    total: float
    free: float


def gpus() -> list[Gpu]:
    """The visible GPUs."""
    found = []
    for i in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(i)
        found.append(Gpu(torch.cuda.get_device_name(i), total / 2**30, free / 2**30))
    return found


def environment() -> dict[str, str]:
    """Subject → what there is, and what to do where something is missing."""
    versions = {name: _version(name) for name in _PACKAGES}
    cuda = torch.cuda.is_available()
    return {
        "Python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "packages": ", ".join(f"{name} {v}" for name, v in versions.items() if v),
        "GPU": "; ".join(f"{g.name}, {g.free:.1f} of {g.total:.1f} GiB free" for g in gpus()) or _no_gpu(),
        "attention": _attention(cuda),
        "4-bit": "bitsandbytes" + ("" if cuda else ", on the CPU: right, but slow")
        if versions["bitsandbytes"]
        else "missing: pip install bitsandbytes, or leave model.quantize out",
        "compile": _compile(cuda),
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _no_gpu() -> str:
    built = torch.version.cuda
    if built is None:
        return "none: this torch is built for the CPU; for a GPU install a CUDA build"
    return f"none visible to torch (built for CUDA {built}): see nvidia-smi and CUDA_VISIBLE_DEVICES"


def _attention(cuda: bool) -> str:
    if not cuda:
        return "torch's, on the CPU"
    if torch.cuda.get_device_capability() < (8, 0):
        return "memory-efficient (the flash kernel needs an Ampere GPU or newer, as does bfloat16)"
    if prefers_cudnn():
        return "cuDNN; for packed rows of short documents varlen flash"
    return "varlen flash for packed rows, memory-efficient for padded ones, else torch's choice"


def _compile(cuda: bool) -> str:
    if cuda and find_spec("triton") is None:
        return "missing triton: pip install triton, or set model.compile_layers to false"
    if shutil.which("cc") is None and shutil.which("gcc") is None:
        return "missing a C compiler: install gcc, or set model.compile_layers to false"
    return "triton" if cuda else "C++"
