"""From options to a network: new or pretrained, quantized or not, with or without adapters, and how it computes."""

from collections.abc import Callable, Mapping
from dataclasses import fields
from importlib.util import find_spec
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from dream_lightning.adapters import (
    LoraParams,
    Quantize,
    add_lora,
    base_hash,
    check_base,
    load_quantized,
    train_in_float8,
    trainable_summary,
)
from dream_lightning.diffusion.objective import check_focal
from dream_lightning.diffusion.weighting import check_cart_p
from dream_lightning.errors import UserError, check_range
from dream_lightning.model import DreamConfig, DreamModel, check_tokenizer
from dream_lightning.model.autoregressive import config_from_qwen2, from_qwen2
from dream_lightning.model.loading import check_weights, local_folder, weight_files
from dream_lightning.training import fsdp

_REQUIRED = {"hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"}


def check_options(o: Mapping[str, Any]) -> None:
    """Raise UserError for options of `DreamModule` that are out of range, or exclude each other."""
    starts = {name: o[name] for name in ("pretrained", "from_autoregressive", "new_model")}
    if list(starts.values()).count(None) != 2:
        raise UserError(
            f"{', '.join(f'{name} is {value!r}' for name, value in starts.items())}: wanted exactly one of them; add a "
            "config, such as --config tiny, or remove what it sets, such as --model.new_model=null"
        )
    if o["tokenizer"] is None and o["pretrained"] is None:
        raise UserError("a new model needs a tokenizer: name a folder or hub id, or `bytes`")
    lora, causal, masks = o["lora"], o["causal"], (o["complementary_masks"], o["treat_eos_as_one"])
    if not isinstance(lora, LoraParams | None):
        raise UserError(f"lora is {lora!r:.200}, wanted LoraParams, such as LoraParams(rank=16)")
    if o["quantize"] is not None and not lora:
        raise UserError(f"quantize is {o['quantize']}, but quantized weights do not train: set model.lora too")
    if o["float8_products"] and lora:
        raise UserError("float8_products is for trained weights, lora freezes them: set model.quantize to float8")
    if lora and o["pretrained"] is None:
        raise UserError("model.lora adapts a pretrained model: set model.pretrained")
    check_range("warmup_fraction", o["warmup_fraction"], least=0, most=1)
    if not isinstance(o["gradient_checkpointing"], bool):
        check_range("gradient_checkpointing", o["gradient_checkpointing"], least=0, whole=True)
    check_range("seed", o["seed"], least=0, most=2**32 - 1, whole=True)
    steps = {"least": 0, "most": 0 if causal else 2**31, "whole": True}
    check_range("anneal_causal_steps (0 with causal)", o["anneal_causal_steps"], **steps)
    if causal and (o["weighting"] not in ("original", "none") or any(masks)):
        raise UserError(
            f"causal has no masks: weighting is {o['weighting']}, wanted original or none, which are the same, with "
            f"complementary_masks ({masks[0]}) and treat_eos_as_one ({masks[1]}) false"
        )
    check_cart_p(o["cart_p"])
    check_focal(o["focal_alpha"], o["focal_gamma"])
    check_range("certainty_weight", o["certainty_weight"], least=0)
    check_range("certainty_temperature", o["certainty_temperature"], least=1e-3)
    if o["certainty_weight"] and o["focal_gamma"]:
        raise UserError("certainty_weight sharpens what focal_gamma does not train on: set one of them to 0")


def build(module: L.LightningModule, trainer: L.Trainer | None) -> None:
    """Set `model` of a DreamModule, and `base`, the fingerprint of what its adapters adapt."""
    device = torch.device("cpu") if trainer is None else trainer.strategy.root_device
    if module.compile_layers:
        start_compilers(device)
    module.model = model = _network(module, device)
    check_tokenizer(module.tokenizer, model.config)
    if model.config.causal and not module.causal:
        raise UserError("the model's config.json is causal, an autoregressive baseline: set model.causal to true")
    model.config.causal = module.causal
    if module.lora is not None:
        options = {"pretrained": module.pretrained, "seed": module.seed, "device": device if module.sharded else None}
        module.base = adapt(model, module.lora, **options) | {"quantize": module.quantize or "none"}
        if not module.sharded:
            fsdp.ignore_frozen_in_ddp(module)
    if module.float8_products:
        train_in_float8(model, device)
    trains = trainer is not None and trainer.training
    one_length = trains and getattr(trainer.datamodule, "preload", False)
    install_kernels(model, training=trains, one_length=one_length)
    if module.compile_layers:
        compile_layers(model)
    if module.gradient_checkpointing:
        checkpoint_layers(model, module.gradient_checkpointing)
    if module.sharded:
        compute_dtype = torch.bfloat16 if trainer.precision == "bf16-mixed" else None
        steps = ("training_step", "validation_step", "test_step", "predict_step")
        if module.pretrained is None:
            for parameter in model.to(device).parameters():  # those of rank 0, because they are random
                torch.distributed.broadcast(parameter.detach(), src=0)
        mesh = module.device_mesh["data_parallel"]
        fsdp.shard(model, module, mesh=mesh, compute_dtype=compute_dtype, steps=steps)
        if module.pretrained is not None:
            fsdp.read_shards(model, weight_files(local_folder(module.pretrained)), device)
    rank_zero_info(trainable_summary(model.train()))


def _network(module: L.LightningModule, device: torch.device) -> DreamModel:
    """New or pretrained; on the meta device if it is sharded after that."""
    dtype = module.weights_dtype
    if module.from_autoregressive is not None:
        return from_qwen2(module.from_autoregressive, module.tokenizer, dtype=dtype)
    if module.pretrained is None:
        return random_model(module.new_model, module.tokenizer).to(dtype)
    if module.quantize is not None:
        return quantized_model(module.pretrained, module.quantize, device)
    if module.sharded:
        return empty_model(module.pretrained).to(dtype)
    return DreamModel.from_pretrained(module.pretrained, dtype=dtype)


def new_config(sizes: dict[str, int | float], tokenizer: PreTrainedTokenizerBase) -> DreamConfig:
    """The configuration of a new Dream with the tokenizer's ids; sizes are fields of `DreamConfig`."""
    known = {f.name for f in fields(DreamConfig)}
    if unknown := sorted(set(sizes) - known):
        raise UserError(f"new_model has {', '.join(unknown)}; a Dream's sizes are {', '.join(sorted(known))}")
    if missing := sorted(_REQUIRED - set(sizes)):
        raise UserError(f"new_model lacks {', '.join(missing)}: set them, they have no default")
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("mask", "pad", "bos", "eos")}
    vocab_size = -(-len(tokenizer) // 64) * 64  # whole tiles for the head's matrix product
    heads = {"num_key_value_heads": sizes["num_attention_heads"]}
    return DreamConfig(**{"vocab_size": vocab_size, **heads, **special, **sizes})


def config_of(
    pretrained: str | None,
    sizes: dict[str, int | float] | None,
    tokenizer: PreTrainedTokenizerBase,
    from_autoregressive: str | None = None,
) -> DreamConfig:
    if from_autoregressive is not None:
        return config_from_qwen2(local_folder(from_autoregressive, files=("config.json",)), tokenizer)
    if pretrained is None:
        return new_config(sizes, tokenizer)
    return DreamConfig.from_pretrained(local_folder(pretrained, files=("config.json",)))


def random_model(sizes: dict[str, int | float], tokenizer: PreTrainedTokenizerBase) -> DreamModel:
    return DreamModel(new_config(sizes, tokenizer))


def quantized_model(pretrained: str, kind: Quantize, device: torch.device) -> DreamModel:
    """A pretrained model whose layers are quantized on the device, tensor by tensor."""
    model = empty_model(pretrained)
    load_quantized(model, weight_files(local_folder(pretrained)), kind=kind, device=device)
    return model


def empty_model(pretrained: str) -> DreamModel:
    """A pretrained model on the meta device, whose weights are read later."""
    folder = local_folder(pretrained)
    with torch.device("meta"):
        model = DreamModel(DreamConfig.from_pretrained(folder))
    check_weights(folder, {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()})
    return model


def adapt(
    model: DreamModel, lora: LoraParams, *, pretrained: str, seed: int, device: torch.device | None = None
) -> dict[str, str]:
    """Add adapters; returns name and content hash of their base. `device` as in `add_lora`."""
    base = {"name": pretrained, "hash": base_hash(weight_files(local_folder(pretrained)))}
    if lora.adapter is not None:
        check_base(lora.folder.base, base)
    add_lora(model, lora, generator=torch.Generator().manual_seed(seed), device=device)
    return base


def _has_kernels() -> bool:
    return find_spec("dream_lightning.kernels") is not None


def accumulate_in_place(model: DreamModel, enable: bool) -> bool:
    """Let trained linear layers accumulate their weight gradients in place, or autograd; returns whether they do."""
    if not _has_kernels():
        return False
    from dream_lightning.kernels import gradient_accumulation

    gradient_accumulation.accumulate_by_autograd(model)
    if enable:
        gradient_accumulation.accumulate_in_place(model)
    return enable


def install_kernels(model: DreamModel, *, training: bool, one_length: bool = False) -> None:
    """Use the kernels for packed rows on a CUDA GPU.

    `training` also enables cuDNN plans for all lengths, in the whole process: call this before the first attention.
    For rows of `one_length` torch's own plans are faster.
    """
    if torch.cuda.is_available() and _has_kernels():
        from dream_lightning.kernels import packed_attention

        if training and not one_length:
            packed_attention.enable_dynamic_cudnn_plans()
        elif training:
            packed_attention.refuse_dynamic_cudnn_plans()
        packed_attention.install(model)


def start_compilers(device: torch.device) -> None:
    """Start the compiler's worker processes while weights are read: the first compilation would wait 3 s for them."""
    if device.type == "cuda":
        from torch._inductor.async_compile import maybe_warm_pool

        maybe_warm_pool()


def compile_layers(model: DreamModel, **options: Any) -> None:
    """Compile each decoder layer at its first call, for rows of all lengths; `options` are those of torch.compile."""
    if torch.cuda.is_available() and _has_kernels():
        from dream_lightning.kernels import activation_budget

        activation_budget.install()
    # One graph for each combination of gradients or none, padding or none, one row or several: a fit with validation
    # and answers comes near torch's limit of 8, beyond which layers would run uncompiled with only a warning.
    torch._dynamo.config.recompile_limit, torch._dynamo.config.accumulated_recompile_limit = 1024, 4096
    for layer in model.model.layers:
        layer.compile(**options)
        layer._compiled_call_impl = _for_any_length(layer, layer._compiled_call_impl)


def _for_any_length(layer: nn.Module, compiled: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Mark the lengths in a training layer's inputs as dynamic: torch would compile for the first length alone."""

    def call(x: Tensor, rotation: tuple[Tensor, Tensor], mask: Any, *others: Any) -> Tensor:
        if torch.compiler.is_compiling():  # the whole step, for one length
            return layer.forward(x, rotation, mask, *others)
        if layer.training:
            lengths = [(x, 1), (rotation[0], 2), (rotation[1], 2)]
            for tensor in () if mask is None else vars(mask).values():
                if isinstance(tensor, Tensor):
                    axes = (0,) if tensor.dim() == 1 else (2, 3)  # starts of documents [C+1], masks [B, 1, L or 1, L]
                    lengths += [(tensor, axis) for axis in axes if tensor.shape[axis] > 1]
            for tensor, axis in lengths:
                torch._dynamo.maybe_mark_dynamic(tensor, axis)
        return compiled(x, rotation, mask, *others)

    return call


def checkpoint_layers(model: DreamModel, which: bool | int) -> None:
    """Recompute layers in the backward pass: all (True) or the first n."""
    # transformers 5.24 warns about the older name.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    if which is not True:
        model.model.checkpointed_layers = which
