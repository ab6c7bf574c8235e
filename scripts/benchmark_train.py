"""Speed and memory of training at the shapes of a checkpoint, beside a reference in the same run.

python scripts/random_checkpoint.py --folder /tmp/dream7b --tokenizer TOKENIZER_FOLDER --device cuda
python scripts/benchmark_train.py --pretrained /tmp/dream7b --cases '[full, lora]' --authors_code FOLDER
"""

import gc
import os
import resource
import time
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Literal

import lightning as L
import torch
from jsonargparse import auto_cli
from reference_training import time_reference
from torch.utils.data import DataLoader, Dataset

from dream_lightning import DreamModule
from dream_lightning.adapters import LoraParams
from dream_lightning.batch import Batch, Document, SampleKey
from dream_lightning.cli import readable_errors, tune_gc
from dream_lightning.data.packing import collate, pack
from dream_lightning.memory import Setting, make_plan
from dream_lightning.model import DreamConfig

S1K_MEDIAN, S1K_SPREAD, S1K_SHORTEST = 4986, 0.55, 969  # tokens of a document, as a log-normal; FACTS of s1K
PROMPT = 128  # tokens of a document that are never masked


@dataclass(frozen=True)
class Case:
    """One way to train."""

    work: Literal["full", "full_float8", "lora", "lora_float8", "qlora", "qlora_float8"]
    rows: int
    length: int
    targets: list[str] | Literal["all-linear"] = "all-linear"
    checkpointed: bool | int = False
    compiled: bool = True
    accumulate: int = 8


CASES = {
    "full": Case("full", 2, 2048),
    "full_float8": Case("full_float8", 2, 2048),
    "full_partly_checkpointed": Case("full", 2, 2048, checkpointed=10),
    "full_checkpointed": Case("full", 4, 2048, checkpointed=True),
    "lora": Case("lora", 4, 2048),
    "lora_8_rows": Case("lora", 8, 2048),
    "lora_float8": Case("lora_float8", 4, 2048),
    "lora_checkpointed": Case("lora", 4, 2048, checkpointed=True),
    "qlora": Case("qlora", 4, 2048),
    "qlora_8_rows": Case("qlora", 8, 2048),
    "qlora_float8": Case("qlora_float8", 4, 2048),
    "qlora_checkpointed": Case("qlora", 4, 2048, checkpointed=True),
    "qlora_small": Case("qlora", 1, 2048, ["q_proj", "v_proj"], checkpointed=25),
    "qlora_8k": Case("qlora", 1, 8192, checkpointed=True),
    "qlora_32k": Case("qlora", 1, 32768, checkpointed=True, accumulate=1),
    "smallest": Case("lora", 2, 64, accumulate=2),
}


class PackedRows(Dataset):
    """Micro-batches of random tokens in documents with s1K's lengths, cut to the row's."""

    def __init__(self, micro_batches: int, case: Case) -> None:
        generator = torch.Generator().manual_seed(0)
        wanted = micro_batches * case.rows
        drawn = (S1K_MEDIAN * torch.exp(S1K_SPREAD * torch.randn(16 * wanted, generator=generator))).int()
        lengths = drawn.clamp(min(S1K_SHORTEST, case.length // 2), case.length).tolist()
        self.lengths, self.case, self.micro_batches = lengths, case, micro_batches
        rows = pack(lengths, case.length)
        order = torch.randperm(len(rows), generator=generator)[:wanted].tolist()
        self.rows = [rows[i] for i in order]
        filled = sum(lengths[i] for row in self.rows for i in row)
        self.useful = filled / (wanted * case.length)

    def __len__(self) -> int:
        return self.micro_batches

    def __getitem__(self, index: int) -> Batch:
        rows = self.rows[index * self.case.rows : (index + 1) * self.case.rows]
        drawn = [[(SampleKey(0, i, i), self._document(i)) for i in row] for row in rows]
        return collate(drawn, pad_token_id=0)

    def _document(self, index: int) -> Document:
        ids = torch.randint(0, 256, (self.lengths[index],), generator=torch.Generator().manual_seed(index)).tolist()
        prompt = min(PROMPT, len(ids) // 2)
        return Document(str(index), ids[:prompt], ids[prompt:], [1.0] * (len(ids) - prompt))


class Clock(L.Callback):
    """When training began and each optimizer step ended, the loss, and memory."""

    def __init__(self) -> None:
        self.ends, self.losses = [], []

    def on_train_start(self, trainer, pl_module) -> None:
        self.loaded, self.host = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        self.loading_peak = 0.0
        if torch.cuda.is_available():
            self.loading_peak = torch.cuda.max_memory_allocated() / 2**30
            torch.cuda.reset_peak_memory_stats()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if trainer.global_step > len(self.ends):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.ends.append(time.perf_counter())
            self.losses.append(round(trainer.callback_metrics["train/loss"].item(), 3))


def fused_adamw(groups):
    """The optimizer of adapters."""
    return torch.optim.AdamW(groups, lr=2e-4, betas=(0.9, 0.95), weight_decay=0.01, fused=torch.cuda.is_available())


def adamw_8bit(groups):
    """The optimizer of full fine-tuning on one GPU."""
    from dream_lightning.training.optimizer import AdamW8bit

    return AdamW8bit(groups, lr=2e-6, betas=(0.9, 0.95), weight_decay=0.01)


def options_of(case: Case) -> dict[str, Any]:
    """Arguments of DreamModule."""
    options = {"dtype": "bfloat16", "gradient_checkpointing": case.checkpointed, "compile_layers": case.compiled}
    if case.work.startswith("full"):
        return options | {"optimizer": adamw_8bit, "float8_products": case.work == "full_float8"}
    lora = LoraParams(rank=16, alpha=32, targets=case.targets)
    quantize = {"qlora": "nf4", "qlora_float8": "nf4_float8", "lora_float8": "float8"}.get(case.work)
    return options | {"optimizer": fused_adamw, "lora": lora, "quantize": quantize}


def time_ours(case: Case, pretrained: str, steps: int) -> dict[str, Any]:
    """Fit through DreamModule and Lightning; the first two of the optimizer steps are left out."""
    started, clock = time.perf_counter(), Clock()
    trainer = L.Trainer(
        devices=1,
        precision="bf16-mixed",
        max_steps=steps,
        accumulate_grad_batches=case.accumulate,
        gradient_clip_val=1.0,
        callbacks=[clock],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    rows = PackedRows(steps * case.accumulate, case)
    module = DreamModule(pretrained, lr_schedule="constant_with_warmup", **options_of(case))
    trainer.fit(module, DataLoader(rows, batch_size=None, num_workers=2, pin_memory=torch.cuda.is_available()))
    seconds = (clock.ends[-1] - clock.ends[1]) / (len(clock.ends) - 2)
    plan = make_plan(
        Setting(
            DreamConfig.from_pretrained(pretrained),
            case.rows,
            case.length,
            module.optimizer,
            dtype=torch.bfloat16,
            lora=module.lora,
            four_bit=case.work in ("qlora", "qlora_float8"),
            float8_products=case.work.endswith("_float8"),
            checkpointed=case.checkpointed,
            compiled=case.compiled,
            accumulation=case.accumulate,
        )
    )
    return {
        "plan": plan.peak_gib,
        "plan_moment": plan.peak_moment,
        "tokens_per_second": case.rows * case.length * case.accumulate / seconds,
        "peak": torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else float("nan"),
        "loading": clock.loaded - started,
        "loading_peak": clock.loading_peak,
        "host": clock.host,
        "first_step": clock.ends[0] - started,
        "useful": rows.useful,
        "losses": clock.losses,
    }


def describe(case: Case) -> str:
    """A case in words."""
    adapters = [] if case.work.startswith("full") else [f"r 16 on {case.targets}"]
    parts = [case.work, *adapters, f"{case.rows} × {case.length}"]
    if case.checkpointed:
        parts.append("checkpointing" if case.checkpointed is True else f"{case.checkpointed} layers checkpointed")
    return ", ".join([*parts, *(["compiled"] if case.compiled else []), f"{case.accumulate} micro-batches a step"])


def main(
    pretrained: str,
    cases: list[str] = ("full", "lora", "qlora", "qlora_small", "qlora_32k"),
    authors_code: str | None = None,
    reference: bool = True,
    steps: int = 5,
) -> None:
    """Train a few optimizer steps of every case and of its reference, and print a table.

    Host memory is the most that the process has held until training began, interpreter and libraries included; it never
    falls, so only the first case of a run says what its own loading takes.

    Args:
        pretrained: an official-format folder with its tokenizer.
        cases: names in CASES.
        authors_code: folder of the authors' modeling_dream.py, which then is the reference's model.
        reference: also time a plain loop: full logits, PEFT's and bitsandbytes' own layers, not compiled.
        steps: optimizer steps; the mean leaves the first two out.
    """
    os.environ["TORCH_CUDNN_SDPA_AVOID_RECOMPILE"] = "0"  # rows of one length; see `model.documents`
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    table = [
        f"| {device} | tok/s | peak GiB | planned GiB | loaded after s | with GiB | on the host GiB "
        "| first step after s | reference tok/s | its peak GiB | times |",
        "|---" * 11 + "|",
    ]
    for name in cases:
        case = CASES[name]
        ours = _guarded(lambda case=case: time_ours(case, pretrained, steps))
        print(name, ours, flush=True)
        other = None
        if reference:
            plain = replace(case, checkpointed=True, accumulate=min(case.accumulate, 2))
            batches = list(islice(iter(PackedRows(4, plain)), 4))
            other = _guarded(
                lambda plain=plain, batches=batches: time_reference(
                    plain, pretrained, batches, options_of(plain), authors_code
                )
            )
            print(name, "reference", other, flush=True)
        table.append(_line(case, ours, other))
        print(table[-1], flush=True)
    print("\n".join(table))


def _guarded(measure) -> dict[str, Any] | str:
    try:
        return measure()
    except torch.OutOfMemoryError:
        return "out of memory"
    finally:
        gc.collect()
        torch._dynamo.reset()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _line(case: Case, ours: dict | str, other: dict | str | None) -> str:
    cells = [describe(case)]
    if isinstance(ours, str):
        cells += [ours, *["–"] * 6]
    else:
        cells += [f"{ours['tokens_per_second']:,.0f}", f"{ours['peak']:.1f}", f"{ours['plan']:.1f}"]
        cells += [f"{ours['loading']:.0f}", f"{ours['loading_peak']:.1f}", f"{ours['host']:.1f}"]
        cells += [f"{ours['first_step']:.0f}"]
    if not isinstance(other, dict):
        return "| " + " | ".join([*cells, other or "–", "–", "–"]) + " |"
    cells += [f"{other['tokens_per_second']:,.0f}", f"{other['peak']:.1f}"]
    ratio = f"{ours['tokens_per_second'] / other['tokens_per_second']:.2f}" if isinstance(ours, dict) else "–"
    return "| " + " | ".join([*cells, ratio]) + " |"


if __name__ == "__main__":
    tune_gc()  # as python -m dream_lightning does; it serves the reference too
    with readable_errors():
        auto_cli(main, as_positional=False)
