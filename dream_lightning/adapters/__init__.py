"""Adapters on a frozen base: LoRA through PEFT, the base in 4 bits through bitsandbytes or in 8-bit floats.

And, for weights that train, 8-bit floats and sums of gradients in place.
"""

from dream_lightning.adapters.base_fingerprint import base_hash, check_adapters, check_base
from dream_lightning.adapters.float8 import load_float8
from dream_lightning.adapters.float8_training import train_in_float8
from dream_lightning.adapters.lora import (
    LoraParams,
    adapter_state,
    add_lora,
    load_adapter_state,
    merge_lora,
    save_peft_folder,
)
from dream_lightning.adapters.quantization import (
    ParameterCount,
    held_in_bfloat16,
    is_4bit,
    load_4bit,
    quantize_layers,
    trainable_summary,
)
from dream_lightning.kernels.gradient_accumulation import accumulate_by_autograd, accumulate_in_products, zero_gradients

__all__ = [
    "LoraParams",
    "ParameterCount",
    "accumulate_by_autograd",
    "accumulate_in_products",
    "adapter_state",
    "add_lora",
    "base_hash",
    "check_adapters",
    "check_base",
    "held_in_bfloat16",
    "is_4bit",
    "load_4bit",
    "load_adapter_state",
    "load_float8",
    "merge_lora",
    "quantize_layers",
    "save_peft_folder",
    "train_in_float8",
    "trainable_summary",
    "zero_gradients",
]
