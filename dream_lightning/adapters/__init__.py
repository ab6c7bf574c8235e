"""Adapters on a frozen base, plain or quantized, and float8 products for weights that train."""

from dream_lightning.adapters.base_fingerprint import base_hash, check_base
from dream_lightning.adapters.float8_linear import train_in_float8
from dream_lightning.adapters.lora import (
    LoraParams,
    adapter_state,
    add_lora,
    add_trained_lora,
    load_adapter_state,
    merge_lora,
    model_names,
    trainable_summary,
)
from dream_lightning.adapters.peft_folder import is_peft_folder, read_peft_folder, read_peft_weights, save_peft_folder
from dream_lightning.adapters.quantized_linear import Quantize, dequantized, load_quantized

__all__ = [
    "LoraParams",
    "Quantize",
    "adapter_state",
    "add_lora",
    "add_trained_lora",
    "base_hash",
    "check_base",
    "dequantized",
    "is_peft_folder",
    "load_adapter_state",
    "load_quantized",
    "merge_lora",
    "model_names",
    "read_peft_folder",
    "read_peft_weights",
    "save_peft_folder",
    "train_in_float8",
    "trainable_summary",
]
