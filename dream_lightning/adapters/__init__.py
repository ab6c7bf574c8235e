"""Adapters on a frozen base, plain or quantized, and float8 products for weights that train."""

from dream_lightning.adapters.base_fingerprint import base_hash, check_base
from dream_lightning.adapters.float8_linear import train_in_float8
from dream_lightning.adapters.lora import (
    LoraParams,
    adapter_state,
    add_lora,
    load_adapter_state,
    merge_lora,
    save_peft_folder,
    trainable_summary,
)
from dream_lightning.adapters.quantized_linear import Quantize, dequantized, load_quantized

__all__ = [
    "LoraParams",
    "Quantize",
    "adapter_state",
    "add_lora",
    "base_hash",
    "check_base",
    "dequantized",
    "load_adapter_state",
    "load_quantized",
    "merge_lora",
    "save_peft_folder",
    "train_in_float8",
    "trainable_summary",
]
