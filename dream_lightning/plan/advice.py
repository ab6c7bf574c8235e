"""What to change where a plan does not fit, in which order, and what each change brings."""

from collections.abc import Iterator
from dataclasses import replace

import torch

from dream_lightning.adapters import LoraParams
from dream_lightning.plan.memory import Plan, make_plan
from dream_lightning.plan.setting import Setting

_SHORTEST = 1024  # tokens; shorter rows hold hardly a thought
_GPUS = (2, 4, 8, 16, 32, 64)


def changes(setting: Setting, gpu_gib: float) -> list[tuple[str, Plan]]:
    """What to change, in order, and the plan with it: batch, length, checkpointing, 4 bits, more GPUs.

    Each stands on those before it, except that more GPUs go without 4 bits, which do not shard; of those the list
    goes as far as the first that fit `gpu_gib`.
    """
    found = [(options, make_plan(changed)) for options, changed in _ladder(setting)]
    if setting.four_bit:
        return found
    unpacked = [setting, *(changed for _, changed in _ladder(setting) if not changed.four_bit)][-1]
    config = "configs/fsdp_lora.yaml" if setting.lora else "configs/fsdp_full.yaml"
    for gpus in (n for n in _GPUS if n > setting.gpus):
        found.append((f"--config {config} on {gpus} GPUs, without 4 bits", make_plan(replace(unpacked, gpus=gpus))))
        if found[-1][1].needed_gib <= gpu_gib:
            break
    return found


def _ladder(s: Setting) -> Iterator[tuple[str, Setting]]:
    if s.rows > 1:
        accumulation = s.accumulation * s.rows
        s = replace(s, rows=1, accumulation=accumulation)
        yield f"--data.batch_size=1 --trainer.accumulate_grad_batches={accumulation} (the same steps)", s
    if s.length > _SHORTEST:
        length = max(s.length // 2, _SHORTEST)
        s = replace(s, length=length)
        yield f"--data.max_length={length} (shortens thinking; the data report counts what is cut)", s
    if s.recomputed < s.config.num_hidden_layers:
        s = replace(s, checkpointed=True)
        yield "--model.gradient_checkpointing=true (about a third slower)", s
    if not s.four_bit and s.gpus == 1:
        options = (
            "--model.quantize=nf4 with --model.lora (adapters on a 4-bit base, as in configs/single_gpu_qlora.yaml)"
        )
        yield options, replace(s, four_bit=True, dtype=torch.bfloat16, mixed=True, lora=s.lora or LoraParams())
