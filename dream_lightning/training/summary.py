"""What a run was and what came of it: settings and a layout for the logger, and a summary when training ends."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info

from dream_lightning.reporting import duration
from dream_lightning.tasks import proportion_interval
from dream_lightning.training.checkpointing import settings_of_run

_SCORES = ("val/nll", "val/accuracy", "val/unparsed", "val/tokens_per_forward")  # of TensorBoard's HParams tab
_LAYOUT = {  # of its Custom Scalars tab: category → chart → scalars
    "loss": {"training": ["train/loss"], "validation": ["val/nll"], "by noise level": [r"train/nll_t_quartile_\d"]},
    "validation": {"accuracy": ["val/accuracy", "val/unparsed"], "tokens per forward": ["val/tokens_per_forward"]},
    "speed": {"tokens per second": ["train/tokens_per_second"], "use of the GPU": ["train/mfu", "train/useful_share"]},
}


class RunSummary(L.Callback):
    """Give loggers the settings of the run, TensorBoard also a layout of charts; print a summary when `fit` ends."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._began, self._validated, self._energy = time.monotonic(), 0.0, _joules(pl_module.device)
        settings = {name: _plain(value) for name, value in settings_of_run(pl_module).items()}
        for logger in trainer.loggers if trainer.is_global_zero else ():
            if isinstance(logger, TensorBoardLogger):
                _describe(logger, settings)
            else:
                logger.log_hyperparams(settings)

    def on_validation_start(self, *arguments: Any) -> None:
        self._validation_began = time.monotonic()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._validated += time.monotonic() - self._validation_began

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        now = _joules(pl_module.device)  # later, the module is on the CPU
        used = float("nan") if now is None or self._energy is None else now - self._energy
        self._energy = float(trainer.strategy.reduce(torch.tensor(used, device=pl_module.device), reduce_op="sum"))

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not hasattr(self, "_began"):  # nothing was left to train
            return
        seconds = time.monotonic() - self._began
        lines = [f"Trained to step {trainer.global_step:,} in {duration(seconds)}"]
        if self._validated:
            lines[0] += f", {self._validated / seconds:.0%} of it validation"
        if self._energy == self._energy:
            lines[0] += f", {self._energy / 3.6e6:.3g} kWh by the {trainer.world_size} GPU(s)"
        lines += [*score_lines(trainer.callback_metrics), *_checkpoints(trainer)]
        rank_zero_info("\n".join(lines))


def score_lines(metrics: Mapping[str, Any]) -> list[str]:
    """A line for each score of a validation or test; shares with their number and 95 % interval (Wilson)."""
    scores = {name: float(value) for name, value in metrics.items() if name.startswith(("val/", "test/"))}
    lines = []
    for name, value in sorted(scores.items()):
        stage, _, kind = name.partition("/")
        count = round(scores.get(f"{stage}/scored", 0))
        shown, note = f"{value:.5g}", {"nll": "nats a token, an upper bound"}.get(kind, "")
        if kind in ("accuracy", "unparsed") and count:
            low, high = proportion_interval(round(value * count), count)
            shown = f"{value:.1%}"
            note = f"{round(value * count)} of {count}, 95 % interval {low:.1%} to {high:.1%}"
        if kind != "scored" or not count:
            lines.append(f"  {name:24} {shown:>9}   {note}".rstrip())
    return lines


def _checkpoints(trainer: L.Trainer) -> list[str]:
    """The files and what to do with them."""
    lines, last = [], None
    for callback in trainer.checkpoint_callbacks:
        if not isinstance(callback, ModelCheckpoint):
            continue
        last = callback.last_model_path or last
        if callback.monitor and callback.best_model_path:
            score = f"{callback.monitor} {float(callback.best_model_score):.5g}"
            lines.append(f"Best checkpoint: {_shown(callback.best_model_path)} ({score})")
    if not (last := last or (trainer.checkpoint_callback and trainer.checkpoint_callback.best_model_path)):
        return lines
    commands = [
        f"dream-lightning chat --model {_shown(last)}",
        f"dream-lightning predict --ckpt_path {_shown(last)} --data.predict_source QUESTIONS.jsonl",
        f"dream-lightning export --model {_shown(last)} --folder my-dream",
    ]
    if isinstance(trainer.logger, TensorBoardLogger):
        commands.append(f"tensorboard --logdir {_shown(trainer.logger.save_dir)}")
        commands.append("  and open http://localhost:6006/#custom_scalars")  # it opens on another tab by itself
    return [*lines, f"Last checkpoint: {_shown(last)}", "Next:", *(f"  {command}" for command in commands)]


def _shown(path: str) -> str:
    whole = Path(path).absolute()
    shown = str(whole.relative_to(Path.cwd())) if whole.is_relative_to(Path.cwd()) else str(whole)
    return f'"{shown}"' if " " in shown else shown  # for a shell of any system


def _plain(value: Any) -> bool | float | str:
    return value if isinstance(value, bool | int | float | str) else str(value)


def _describe(logger: TensorBoardLogger, settings: dict[str, Any]) -> None:
    """Without Lightning's `log_hyperparams`, which would log each score as 0 or −1 at the first step."""
    from torch.utils.tensorboard.summary import hparams

    logger.hparams.update(settings)
    for part in hparams(settings, dict.fromkeys(_SCORES, 0.0)):
        logger.experiment.file_writer.add_summary(part)
    logger.experiment.add_custom_scalars(
        {group: {name: ["Multiline", tags] for name, tags in charts.items()} for group, charts in _LAYOUT.items()}
    )


def _joules(device: torch.device) -> float | None:
    """What the GPU has used since its driver was loaded; None if it or NVML does not say it."""
    if device.type != "cuda":
        return None
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        return pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000
    except pynvml.NVMLError:  # such as a part of a GPU, or one before Volta
        return None
