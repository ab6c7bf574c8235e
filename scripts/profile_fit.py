"""Where the time of a training loop goes: on the CPU the model's share of it, on a GPU how long that is idle.

OMP_NUM_THREADS=2 python scripts/profile_fit.py --config configs/tiny.yaml --trainer.max_steps 200
python scripts/profile_fit.py --config configs/single_gpu_qlora.yaml --trainer.max_steps 6
"""

import sys
import tempfile
import time
from collections.abc import Iterable

import lightning as L
import psutil
import torch
from torch.profiler import ProfilerActivity, profile

from dream_lightning import DreamModule
from dream_lightning.cli import DreamCLI
from dream_lightning.errors import readable_errors

ACTIONS = {  # part → the end of its name in Lightning's profiler
    "model forward, head and loss included": "model forward",
    "backward": ".backward",
    "clipping": ".configure_gradient_clipping",
    "waiting for the next batch": ".train_dataloader_next",
}


def on_the_clock(masked_nll):
    """`DreamModule.masked_nll` as an action of its own; Lightning times the rest already."""

    def timed(self: DreamModule, *arguments):
        with self.trainer.profiler.profile("model forward"):
            return masked_nll(self, *arguments)

    return timed


class GPUTime(L.Callback):
    """How long the GPU works and is idle over some optimiser steps, as the driver records it."""

    WARM_UP, STEPS = 2, 4

    def __init__(self) -> None:
        self._profile = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse a run or an epoch that would end before all is recorded: between epochs the loader starts anew."""
        epoch = trainer.num_training_batches // trainer.accumulate_grad_batches
        for what, steps in (("training", trainer.estimated_stepping_batches), ("an epoch", epoch)):
            if steps < self.WARM_UP + self.STEPS:
                raise ValueError(
                    f"{what} takes {steps} steps: wanted at least {self.WARM_UP} to warm up and {self.STEPS} to "
                    "record, set trainer.max_steps, or data.source to more rows"
                )

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch, batch_idx: int) -> None:
        """Record from a step's first micro-batch on."""
        if self._profile is None and trainer.global_step == self.WARM_UP:
            torch.cuda.synchronize()
            self._profile = profile(activities=[ProfilerActivity.CUDA])
            self._profile.__enter__()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs, batch, batch_idx: int
    ) -> None:
        """Print after the first and after the last."""
        if trainer.global_step == 1 and (batch_idx + 1) == trainer.accumulate_grad_batches:
            torch.cuda.synchronize()
            seconds = time.time() - psutil.Process().create_time()
            print(f"from the start of the program to the end of the first step: {seconds:.0f} s")
        if self._profile is not None and trainer.global_step == self.WARM_UP + self.STEPS:
            self._profile.__exit__(None, None, None)  # waits for the GPU
            events = self._profile.profiler.kineto_results.events()
            on_gpu = [(e.start_ns(), e.start_ns() + e.duration_ns()) for e in events if "CUDA" in str(e.device_type())]
            busy, gaps = busy_and_gaps(on_gpu)
            whole = max(end for _, end in on_gpu) - min(start for start, _ in on_gpu)
            long = [gap for gap in gaps if gap > 1e6]
            print(
                f"{self.STEPS} steps, {whole / 1e9:.2f} s, {len(on_gpu):,} kernels and copies: the GPU is idle "
                f"{100 * (1 - busy / whole):.2f} % of the time, {len(long)} times for more than 1 ms, "
                f"{max(gaps, default=0) / 1e6:.1f} ms at the longest"
            )
            self._profile = None


class GPUTimeCLI(DreamCLI):
    """With GPUTime among the callbacks."""

    def instantiate_trainer(self, **options) -> L.Trainer:
        """As DreamCLI's."""
        trainer = super().instantiate_trainer(**options)
        trainer.callbacks.append(GPUTime())
        return trainer


def busy_and_gaps(intervals: Iterable[tuple[int, int]]) -> tuple[int, list[int]]:
    """Length of the union of (start, end), and of what lies between its parts."""
    busy, gaps, until = 0, [], None
    for start, end in sorted(intervals):
        if until is not None and start > until:
            gaps.append(start - until)
        busy += max(0, end - max(start, until if until is not None else start))
        until = end if until is None else max(until, end)
    return busy, gaps


def main() -> None:
    """Run `fit` with the options of the command line, without validation and checkpoints, and print the shares."""
    options = sys.argv[1:]
    folder = tempfile.mkdtemp(prefix="dream-profile-")
    quiet = ["--trainer.limit_val_batches=0", *([] if torch.cuda.is_available() else ["--trainer.profiler=simple"])]
    folders = [f"--{name}.dirpath={folder}" for name in ("checkpoint", "autosave")] + [
        f"--trainer.logger.init_args.save_dir={folder}"
    ]
    sys.argv[1:] = ["fit", *options, *quiet, *folders, "--autosave.every_n_train_steps=1000000000"]
    if torch.cuda.is_available():
        GPUTimeCLI()
        return
    DreamModule.masked_nll = on_the_clock(DreamModule.masked_nll)
    profiler = DreamCLI().trainer.profiler
    spent = {name: sum(seconds) for name, seconds in profiler.recorded_durations.items()}
    loop = spent["run_training_epoch"]
    parts = {part: sum(s for n, s in spent.items() if n.endswith(end)) for part, end in ACTIONS.items()}
    parts["everything else: noise, optimiser, logging, Lightning"] = loop - sum(parts.values())
    print(f"\n| part of the training loop ({loop:.1f} s) | share |\n|---|---:|")
    for part, seconds in parts.items():
        print(f"| {part} | {100 * seconds / loop:.1f} % |")
    model = sum(list(parts.values())[:2])
    print(f"| **model forward and backward** | **{100 * model / loop:.1f} %** |")


if __name__ == "__main__":
    with readable_errors():
        main()
