"""From the options of `fit` to a setting, without building anything: no model, no data, no Trainer."""

from typing import Any

import torch
from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch.cli import OptimizerCallable

from dream_lightning.adapters import LoraParams
from dream_lightning.errors import UserError
from dream_lightning.model import DreamConfig, load_tokenizer
from dream_lightning.model.loading import local_folder
from dream_lightning.model_factory import check_kind, new_config
from dream_lightning.plan.setting import Setting
from dream_lightning.training.fsdp import refuse_sharded


def setting_from(options: Namespace) -> Setting:
    """What `python -m dream_lightning fit` would run, by its parsed options.

    Of a checkpoint only config.json is read, or fetched; of a new model's tokenizer the size.

    Raises:
        UserError: no configuration at `model.pretrained`; a precision whose memory is not known; what `fit` refuses as
            well; weights to be divided over GPUs whose number is not known.
    """
    model, data, trainer = options.model, options.data, options.trainer
    if (model.pretrained is None) == (model.new_model is None):
        raise UserError("wanted one of model.pretrained and model.new_model: add a config, such as configs/tiny.yaml")
    precision = str(trainer.precision or "32-true")
    if precision not in ("bf16-mixed", "32-true", "32", "bf16-true", "bf16"):
        raise UserError(f"trainer.precision is {precision}: a plan knows bf16-mixed, bf16-true and 32-true")
    lora, sharded = _instantiate(LoraParams | None, model.lora), _is_sharded(trainer.strategy)
    check_kind(model.pretrained, lora=lora, quantize=model.quantize, float8_products=model.float8_products)
    if sharded:
        refuse_sharded(quantized=model.quantize is not None, compiled_answers=model.sampling.compile)
    if model.new_model is not None:
        config = new_config(model.new_model, load_tokenizer(model.tokenizer))
    else:
        config = DreamConfig.from_pretrained(local_folder(model.pretrained, files=("config.json",)))
    bfloat16 = model.quantize is not None or precision in ("bf16-true", "bf16")
    return Setting(
        config,
        rows=data.batch_size * (2 if model.complementary_masks else 1),
        length=data.max_length,
        optimizer=_instantiate(OptimizerCallable, model.optimizer),
        dtype=torch.bfloat16 if bfloat16 else getattr(torch, model.dtype),
        mixed=precision == "bf16-mixed",
        lora=lora,
        four_bit=model.quantize in ("nf4", "nf4_float8"),
        float8_products=model.float8_products or model.quantize in ("nf4_float8", "float8"),
        checkpointed=model.gradient_checkpointing,
        compiled=model.compile_layers,
        accumulation=trainer.accumulate_grad_batches,
        gpus=_gpus(trainer) if sharded else 1,
    )


def _instantiate(kind: Any, value: Any) -> Any:
    parser = ArgumentParser()
    parser.add_argument("--value", type=kind)
    return parser.instantiate_classes(parser.parse_object({"value": value})).value


def _is_sharded(strategy: Any) -> bool:
    name = strategy if isinstance(strategy, str) else getattr(strategy, "class_path", type(strategy).__name__)
    return "fsdp" in name.lower() or "ModelParallel" in name


def _gpus(trainer: Namespace) -> int:
    """How many the options ask for; `auto` and −1 are all that this machine has."""
    devices = trainer.devices
    if isinstance(devices, str) and devices.lstrip("-").isdigit():
        devices = int(devices)
    if isinstance(devices, list):
        devices = len(devices)
    if devices in ("auto", -1) and not (devices := torch.cuda.device_count()):
        raise UserError(
            f"trainer.devices is {trainer.devices}, and no GPU is visible here: say for how many to plan, such as "
            "--trainer.devices=2"
        )
    return int(devices) * (trainer.num_nodes or 1)
