"""What people train Dream with today, to compare with: full logits, no compiler, everything checkpointed, own division.

The model is the authors' own code where its folder is given, otherwise ours run plainly. PEFT and bitsandbytes work as
they come.
"""

import importlib
import json
import sys
import time
import types
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import load_file
from transformers import modeling_rope_utils

from dream_lightning.adapters.quantized_linear import NF4Linear, load_quantized
from dream_lightning.batch import Batch
from dream_lightning.model import DreamConfig, DreamModel
from dream_lightning.model.loading import weight_files


def authors_model(folder: str, config: dict[str, Any]) -> torch.nn.Module:
    """The authors' DreamModel; transformers 5 lost the RoPE entry that it asks for."""

    def default(config, device=None, seq_len=None, **kwargs):
        size = config.hidden_size // config.num_attention_heads
        return config.rope_theta ** -(torch.arange(0, size, 2, device=device).float() / size), 1.0

    modeling_rope_utils.ROPE_INIT_FUNCTIONS.setdefault("default", default)
    package = types.ModuleType("authors_code")
    package.__path__ = [folder]
    sys.modules["authors_code"] = package
    modeling = importlib.import_module("authors_code.modeling_dream")
    configuration = importlib.import_module("authors_code.configuration_dream")
    return modeling.DreamModel(configuration.DreamConfig(**config))


def bitsandbytes_layer(layer: NF4Linear) -> torch.nn.Module:
    """The same layer as bitsandbytes makes it."""
    import bitsandbytes as bnb

    sizes = (layer.in_features, layer.out_features)
    plain = bnb.nn.Linear4bit(*sizes, compute_dtype=torch.bfloat16, quant_type="nf4", device="meta")
    weight = layer.dequantized_weight()
    plain.weight = bnb.nn.Params4bit(weight, quant_type="nf4", compress_statistics=True, module=plain).to(weight.device)
    plain.bias = layer.bias
    return plain


def reference_model(work: str, pretrained: str, targets: Any, authors_code: str | None) -> torch.nn.Module:
    """Loaded, adapted, on the GPU, ready to train."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    folder = Path(pretrained)
    config = {
        k: v
        for k, v in json.loads((folder / "config.json").read_text()).items()
        if k not in ("auto_map", "architectures")
    }
    with torch.device("meta"):
        model = authors_model(authors_code, config) if authors_code else DreamModel(DreamConfig.from_pretrained(folder))
    files = weight_files(folder)
    if work in ("qlora", "qlora_float8"):
        load_quantized(model, files, kind="nf4", device=device)
        for name, layer in list(model.named_modules()):
            if isinstance(layer, NF4Linear):
                model.set_submodule(name, bitsandbytes_layer(layer))
        model.is_loaded_in_4bit = True  # where PEFT looks
    else:
        for file in sorted(set(files.values())):
            tensors = load_file(file, device=device)
            model.load_state_dict({k: t.to(torch.bfloat16) for k, t in tensors.items()}, strict=False, assign=True)
    if authors_code:  # their rotary buffers are in no file
        with torch.device(device):
            rotary = [m for m in model.modules() if type(m).__name__ == "DreamRotaryEmbedding"]
            for module in rotary:
                module.__init__(config=model.config)
    if not work.startswith("full"):
        model.requires_grad_(False)
        names = (
            targets if isinstance(targets, list) else [f"{n}_proj" for n in ("q", "k", "v", "o", "gate", "up", "down")]
        )
        inject_adapter_in_model(LoraConfig(r=16, lora_alpha=32, target_modules=names), model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    return model.train()


def time_reference(
    case: Any, pretrained: str, batches: list[Batch], options: dict[str, Any], authors_code: str | None
) -> dict[str, Any]:
    """Mean over the micro-batches after the first optimizer step."""
    model = reference_model(case.work, pretrained, case.targets, authors_code)
    device = next(p for p in model.parameters()).device
    optimizer = options["optimizer"]([p for p in model.parameters() if p.requires_grad])
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    generator = torch.Generator(device).manual_seed(0)
    for i, batch in enumerate(batches):
        if i == case.accumulate:
            started = _now(device)
        batch = batch.to(device)
        t = torch.rand(len(batch.input_ids), 1, device=device, generator=generator).clamp(min=1e-3)
        masked = batch.maskable & (torch.rand(batch.maskable.shape, device=device, generator=generator) < t)
        x_t = batch.input_ids.masked_fill(masked, model.config.mask_token_id)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            logits = model(x_t).logits
            logits = torch.cat([logits[:, :1], logits[:, :-1]], dim=1)
            nll = F.cross_entropy(logits[masked].float(), batch.input_ids[masked], reduction="none")
            loss = (nll / t.expand_as(masked)[masked]).sum() / masked.sum().clamp(min=1)
        (loss / case.accumulate).backward()
        del logits, nll
        if (i + 1) % case.accumulate == 0:
            torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
            optimizer.step()
            optimizer.zero_grad()
    seconds = (_now(device) - started) / (len(batches) - case.accumulate)
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else float("nan")
    return {"tokens_per_second": case.rows * case.length / seconds, "peak": peak, "loss": round(loss.item(), 3)}


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
