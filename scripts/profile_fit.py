"""Where the time of a training loop goes: on the CPU the model's share of it, on a GPU how long that is idle.

OMP_NUM_THREADS=2 python scripts/profile_fit.py --config configs/tiny.yaml --trainer.max_steps 200
python scripts/profile_fit.py --config configs/single_gpu_qlora.yaml --trainer.max_steps 14
"""

import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable

import lightning as L
import psutil
import torch
from torch._dynamo.utils import calculate_time_spent, counters
from torch.profiler import ProfilerActivity, profile

from dream_lightning import DreamModule
from dream_lightning.cli import DreamCLI, readable_errors, tune_gc

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
    """When the first step ends; how long the GPU works and is idle over some later ones, as the driver records it."""

    WARM_UP, STEPS = 10, 4  # by then most kernels were loaded, for which the GPU stands still 5 ms each

    def __init__(self) -> None:
        self._profile = None
        self._reached = [f"imports {_age():.0f}"]  # s

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """The data are there."""
        self._reached.append(f"data {_age():.0f}")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse a run or an epoch that would end before all is recorded: between epochs the loader starts anew."""
        held = torch.cuda.max_memory_allocated() / 2**30
        host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        self._reached.append(f"model {_age():.0f} ({held:.1f} GiB of the GPU, {host:.1f} GiB of the host at most)")
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
        for name, number in (("first micro-batch", 1), ("first step", trainer.accumulate_grad_batches)):
            if batch_idx + 1 == number and trainer.global_step <= 1:
                torch.cuda.synchronize()
                self._reached.append(f"{name} {_age():.0f}")
        if batch_idx + 1 == trainer.accumulate_grad_batches and trainer.global_step == 1:
            compiling = calculate_time_spent().get("total_wall_time", 0.0)
            graphs = counters["stats"]["unique_graphs"]
            print(f"\nseconds since the start: {', '.join(self._reached)}; compiling {graphs} graphs {compiling:.0f}")
        if self._profile is not None and trainer.global_step == self.WARM_UP + self.STEPS:
            self._profile.__exit__(None, None, None)  # waits for the GPU
            events = self._profile.profiler.kineto_results.events()
            on_gpu = [e for e in events if "CUDA" in str(e.device_type())]
            self._report([(e.start_ns(), e.start_ns() + e.duration_ns(), e.name()) for e in on_gpu])
            self._profile = None

    def _report(self, on_gpu: list[tuple[int, int, str]]) -> None:
        busy, gaps = busy_and_gaps(on_gpu)
        whole = max(end for _, end, _ in on_gpu) - min(start for start, _, _ in on_gpu)
        print(
            f"\n{self.STEPS} steps, {whole / 1e9:.2f} s, {len(on_gpu):,} kernels and copies: the GPU is idle "
            f"{100 * (1 - busy / whole):.2f} % of the time; peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"
        )
        print("\n| idle for | times | share of the time |\n|---|---:|---:|")
        for name, least, most in (("below 10 µs", 0, 1e4), ("10 µs to 1 ms", 1e4, 1e6), ("longer", 1e6, 1e18)):
            some = [gap for gap, _ in gaps if least <= gap < most]
            print(f"| {name} | {len(some):,} | {100 * sum(some) / whole:.2f} % |")
        print("\n| longest, ms | between |\n|---:|---|")
        for gap, (before, after) in sorted(gaps, reverse=True)[:12]:
            print(f"| {gap / 1e6:.1f} | {before[:60]} … {after[:60]} |")
        spent = Counter()
        for start, end, name in on_gpu:
            spent[name] += end - start
        print("\n| kernel | share of the time |\n|---|---:|")
        for name, nanoseconds in spent.most_common(20):
            print(f"| {name[:90]} | {100 * nanoseconds / whole:.1f} % |")


class GPUTimeCLI(DreamCLI):
    """With GPUTime among the callbacks."""

    def instantiate_trainer(self, **options) -> L.Trainer:
        """As DreamCLI's."""
        trainer = super().instantiate_trainer(**options)
        trainer.callbacks.insert(0, GPUTime())  # before Throughput, which counts memory from the start of training
        return trainer


def _age() -> float:
    return time.time() - psutil.Process().create_time()


def busy_and_gaps(intervals: Iterable[tuple[int, int, str]]) -> tuple[int, list[tuple[int, tuple[str, str]]]]:
    """Length of the union of (start, end, name), and of what lies between its parts, with the names around it."""
    busy, gaps, until, last = 0, [], None, ""
    for start, end, name in sorted(intervals):
        if until is not None and start > until:
            gaps.append((start - until, (last, name)))
        busy += max(0, end - max(start, until if until is not None else start))
        if until is None or end > until:
            until, last = end, name
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
        GPUTimeCLI("fit")
        return
    DreamModule.masked_nll = on_the_clock(DreamModule.masked_nll)
    profiler = DreamCLI("fit").trainer.profiler
    spent = {name: sum(seconds) for name, seconds in profiler.recorded_durations.items()}
    loop = spent["run_training_epoch"]
    parts = {part: sum(s for n, s in spent.items() if n.endswith(end)) for part, end in ACTIONS.items()}
    parts["everything else: noise, optimizer, logging, Lightning"] = loop - sum(parts.values())
    print(f"\n| part of the training loop ({loop:.1f} s) | share |\n|---|---:|")
    for part, seconds in parts.items():
        print(f"| {part} | {100 * seconds / loop:.1f} % |")
    model = sum(list(parts.values())[:2])
    print(f"| **model forward and backward** | **{100 * model / loop:.1f} %** |")


if __name__ == "__main__":
    tune_gc()  # as python -m dream_lightning does
    with readable_errors():
        main()
