"""Fine-tune, sample and score the Dream diffusion language model with PyTorch Lightning."""

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

# Set before other imports, which log these: a CPU kernel for 4-bit products that is not used, and advertisements.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
    lambda record: "try installing [lit" not in record.getMessage()
)

if TYPE_CHECKING:
    from dream_lightning.adapters import LoraParams
    from dream_lightning.data import S1KDataModule
    from dream_lightning.model import DreamConfig, DreamModel, load_tokenizer
    from dream_lightning.module import DreamModule
    from dream_lightning.sampling import SamplingParams, diffusion_generate

__all__ = [
    "DreamConfig",
    "DreamModel",
    "DreamModule",
    "LoraParams",
    "S1KDataModule",
    "SamplingParams",
    "diffusion_generate",
    "load_tokenizer",
]
_FOLDERS = {
    **{"LoraParams": "adapters", "S1KDataModule": "data", "DreamModule": "module"},
    **dict.fromkeys(("DreamConfig", "DreamModel", "load_tokenizer"), "model"),
    **dict.fromkeys(("SamplingParams", "diffusion_generate"), "sampling"),
}


def __getattr__(name: str) -> Any:
    """Import a name when it is used (PEP 562): `dream-lightning --help` does without torch."""
    if name not in _FOLDERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_FOLDERS[name]}"), name)
