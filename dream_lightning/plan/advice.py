"""What to change where a plan does not fit, in which order, and what each change brings."""

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec

import torch

from dream_lightning.adapters import LoraParams
from dream_lightning.plan.memory import Plan, make_plan
from dream_lightning.plan.setting import Setting
from dream_lightning.training.optimizer import AdamW8bit

_SHORTEST = 1024  # tokens; shorter rows hold hardly a thought
_GPUS = (2, 4, 8, 16, 32, 64)
_SPARE = 0.05  # of the card, left free where memory is given for speed: plans were up to 9 % below what was measured


def changes(setting: Setting, gpu_gib: float) -> list[tuple[str, Plan]]:
    """What to change, in order, and the plan with it: batch, length, checkpointing, 8 and 4 bits, more GPUs.

    Each stands on those before it, except that more GPUs go without 8 and 4 bits, which do not shard; of those the
    list goes as far as the first that fit `gpu_gib`.
    """
    smaller = list(_smaller_steps(setting))
    s = smaller[-1][1] if smaller else setting
    found = [(options, make_plan(changed)) for options, changed in [*smaller, *_fewer_bits(s)]]
    if setting.four_bit:
        return found
    if s.lora is None:
        s, config = replace(s, dtype=torch.float32, mixed=True, optimizer=torch.optim.AdamW), "configs/fsdp_full.yaml"
    else:
        config = "configs/fsdp_lora.yaml"
    for gpus in (n for n in _GPUS if n > setting.gpus):
        found.append((f"--config {config} on {gpus} GPUs", make_plan(replace(s, gpus=gpus))))
        if found[-1][1].needed_gib <= gpu_gib:
            break
    return found


def faster(setting: Setting, gpu_gib: float) -> tuple[str, Plan] | None:
    """Of a plan that fits, fewer layers to recompute, as few as the memory allows, and the plan with them."""

    def fits(count: int) -> bool:
        return with_layers(count).needed_gib <= (1 - _SPARE) * gpu_gib

    def with_layers(count: int) -> Plan:
        return make_plan(replace(setting, checkpointed=count or False))

    count = bisect_left(range(setting.recomputed), True, key=fits)
    if count == setting.recomputed:
        return None
    return f"--model.gradient_checkpointing={count or 'false'}", with_layers(count)


def _smaller_steps(s: Setting) -> Iterator[tuple[str, Setting]]:
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


def _fewer_bits(s: Setting) -> Iterator[tuple[str, Setting]]:
    if s.four_bit or s.gpus > 1:
        return
    if s.lora is None and s.dtype == torch.float32 and find_spec("bitsandbytes"):
        options = "--config configs/single_gpu_full.yaml (bfloat16 weights with exact updates, 8-bit moments)"
        yield options, replace(s, dtype=torch.bfloat16, mixed=True, optimizer=AdamW8bit)
    options = "--config configs/single_gpu_qlora.yaml (trains adapters on a 4-bit base)"
    yield (
        options,
        replace(s, four_bit=True, float8_products=False, dtype=torch.bfloat16, mixed=True, lora=s.lora or LoraParams()),
    )
