"""Speed and memory of training at the shapes of a checkpoint, through DreamModule and Lightning.

python scripts/random_checkpoint.py --folder /tmp/dream7b --tokenizer TOKENIZER_FOLDER --device cuda
python scripts/benchmark_train.py --pretrained /tmp/dream7b --work qlora --rows 4 --length 2048
"""

import time
from typing import Literal

import lightning as L
import torch
from jsonargparse import auto_cli
from torch.utils.data import DataLoader, Dataset

from dream_lightning import DreamModule
from dream_lightning.adapters import LoraParams
from dream_lightning.model import DreamConfig
from dream_lightning.plan import Setting, make_plan
from dream_lightning.types import Batch

PROMPT = 128  # tokens of every row that are never masked


class RandomRows(Dataset):
    """Micro-batches of random tokens."""

    def __init__(self, count: int, rows: int, length: int) -> None:
        self.count, self.rows, self.length = count, rows, length

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Batch:
        shape = (self.rows, self.length)
        sample = (index * self.rows + torch.arange(self.rows))[:, None].expand(shape)
        return Batch(
            input_ids=torch.randint(0, 1000, shape, generator=torch.Generator().manual_seed(index)),
            maskable=(torch.arange(self.length) >= PROMPT).expand(shape),
            position_ids=torch.arange(self.length).expand(shape),
            places=sample,
            sample_ids=sample,
            epochs=torch.zeros(shape, dtype=torch.int64),
            extra_weight=torch.ones(shape),
        )


class Clock(L.Callback):
    """When each micro-batch ended, and the loss."""

    def __init__(self) -> None:
        self.ends, self.losses = [], []

    def on_train_start(self, trainer, pl_module) -> None:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())
        self.losses.append(round(trainer.callback_metrics["train/loss"].item(), 3))


def paged_adamw_8bit(groups):
    """The optimiser of full fine-tuning on one GPU."""
    import bitsandbytes

    return bitsandbytes.optim.PagedAdamW8bit(groups, lr=2e-6)


def main(
    pretrained: str,
    work: Literal["qlora", "lora", "full"] = "qlora",
    targets: list[str] | Literal["all-linear"] = "all-linear",
    rows: int = 4,
    length: int = 2048,
    micro_batches: int = 8,
    checkpointing: bool = True,
    compiled: bool = False,
) -> None:
    """Train some micro-batches and print a line.

    Args:
        pretrained: an official-format folder with its tokenizer.
        work: 4-bit base with adapters, bfloat16 base with adapters, or all weights in bfloat16 with 8-bit AdamW.
        targets: layers with adapters of rank 16.
        rows: of a micro-batch.
        length: tokens of a row.
        micro_batches: each an optimiser step; the mean leaves the first three out.
        checkpointing: recompute layers in the backward pass.
        compiled: compile the layers.
    """
    options = {"dtype": "bfloat16", "gradient_checkpointing": checkpointing, "compile_layers": compiled}
    if work == "full":
        options["optimizer"] = paged_adamw_8bit
    else:
        options |= {
            "lora": LoraParams(rank=16, alpha=32, targets=targets),
            "quantize": "nf4" if work == "qlora" else None,
        }
    started, clock = time.perf_counter(), Clock()
    trainer = L.Trainer(
        devices=1,
        precision="bf16-mixed",
        max_steps=micro_batches,
        gradient_clip_val=1.0,
        callbacks=[clock],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = DreamModule(pretrained, lr_schedule="constant_with_warmup", **options)
    plan = make_plan(
        Setting(
            DreamConfig.from_pretrained(pretrained),
            rows,
            length,
            module.optimizer,
            dtype=torch.bfloat16,
            lora=module.lora,
            four_bit=work == "qlora",
            checkpointed=float(checkpointing),
        )
    )
    trainer.fit(module, DataLoader(RandomRows(micro_batches, rows, length), batch_size=None))
    seconds = (clock.ends[-1] - clock.ends[2]) / (len(clock.ends) - 3)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    peak = f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if torch.cuda.is_available() else "–"
    planned = f"plan {plan.peak_gib:.1f} GiB: {plan.peak_moment}"
    how = [work, *([f"adapters on {targets}"] if work != "full" else []), f"{rows} × {length}"]
    how += [name for name, used in (("checkpointing", checkpointing), ("compiled", compiled)) if used]
    print(
        f"{device} · {', '.join(how)}: {rows * length / seconds:,.0f} tok/s, {1000 * seconds:.0f} ms a micro-batch, "
        f"peak {peak} ({planned}), first step after {clock.ends[0] - started:.0f} s, "
        f"losses {clock.losses}"
    )


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
