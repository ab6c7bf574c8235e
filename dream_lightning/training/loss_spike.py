"""Spikes of the training loss: which samples they come from, and steps that are skipped because of them."""

import json
import math
from collections import deque
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from dream_lightning.data import S1KDataModule
from dream_lightning.errors import check_range
from dream_lightning.training.fsdp import local
from dream_lightning.training.optimizer import parameters

_LEAST = 20  # steps before the first finite loss that can be a spike
_ACTIONS = {"log": "", "skip": " The step is skipped.", "stop": " The step is skipped and training stops."}


class LossSpike(L.Callback):
    """Name the samples of a step whose loss is far above those before it, and keep the step out of the weights.

    A spike is a `train/loss` that is not finite, or above the mean of the last steps by more than `deviations` of their
    standard deviation: the objectives are noisy in different degrees. It counts in later means as the limit that it
    exceeded, so that a loss that has risen for good is none within a window. Each spike is a warning, and a line in
    `loss_spikes.jsonl` next to the logs.

    The loss of every step is read, which synchronizes with the GPU. A skipped step changes neither weights nor the
    optimizer's states; its `train/gradient_norm` is 0. All ranks decide the same, and a resumed run does too.

    Args:
        action: `log`; `skip` the step; or skip it and `stop` the run, which `Autosave` then saves.
        deviations: how many standard deviations are a spike.
        window: so many steps before it are compared.
        samples: so many of a step are named and saved as text, those that add most to the loss.
    """

    def __init__(
        self,
        action: Literal["log", "skip", "stop"] = "log",
        *,
        deviations: float = 6.0,
        window: int = 100,
        samples: int = 8,
    ) -> None:
        check_range("LossSpike's deviations", deviations, least=0)
        check_range("LossSpike's window", window, least=_LEAST, whole=True)
        check_range("LossSpike's samples", samples, least=1, whole=True)
        self.action, self.deviations, self.samples = action, deviations, samples
        self.losses: deque[float] = deque(maxlen=window)
        self._skipped: list[tuple[torch.nn.Parameter, Tensor]] = []

    def state_dict(self) -> dict[str, Any]:
        return {"losses": list(self.losses)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.losses.extend(state_dict["losses"])

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        pl_module.totals.parts = pl_module.totals.parts or []

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        loss, limit = float(trainer.callback_metrics["train/loss"]), math.inf
        if len(self.losses) >= _LEAST:
            limit = fmean(self.losses) + self.deviations * pstdev(self.losses)
        is_spike = not math.isfinite(loss) or loss > limit
        if math.isfinite(counted := limit if is_spike else loss):
            self.losses.append(counted)
        if is_spike:
            self._report(trainer, pl_module, loss, limit)
        trained = parameters(optimizer)
        # Weights that are not finite would make every step a spike: the run has diverged, and ends where it next saves.
        sound = math.isfinite(loss) or all(local(p).isfinite().all() for p in trained)
        if is_spike and self.action != "log" and trainer.strategy.reduce_boolean_decision(sound):
            # Optimizers leave parameters without a gradient alone. Kernels need the tensors again for the next step.
            self._skipped = [(p, p.grad) for p in trained if p.grad is not None]
            for p, _ in self._skipped:
                p.grad = None
            trainer.should_stop |= self.action == "stop"
        pl_module.totals.parts = []

    def on_train_batch_end(self, *args: Any) -> None:
        for p, gradient in self._skipped:
            p.grad = gradient
        self._skipped = []

    def _report(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: float, limit: float) -> None:
        parts = [_documents(trainer, pl_module)]
        if trainer.world_size > 1:
            mine, parts = parts[0], [None] * trainer.world_size
            torch.distributed.all_gather_object(parts, mine)
        found = [document for part in parts for document in part]
        found.sort(key=lambda d: -d["loss"] if math.isfinite(d["loss"]) else -math.inf)
        file = Path(trainer.log_dir or trainer.default_root_dir) / "loss_spikes.jsonl"
        spike = {"step": trainer.global_step, "loss": loss, "limit": limit, "action": self.action}
        spike["samples"] = found[: self.samples]
        if trainer.is_global_zero:
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("a", encoding="utf-8") as lines:
                plain = json.loads(json.dumps(spike), parse_constant=str)  # JSON has no NaN
                lines.write(json.dumps(plain, ensure_ascii=False) + "\n")
        total = sum(d["loss"] for d in found)
        names = ", ".join(d["id"] + (f" ({d['loss'] / total:.0%})" if math.isfinite(total) else "") for d in found[:3])
        rank_zero_warn(
            f"loss spike at step {trainer.global_step}: {loss:.4g}, limit {limit:.4g}. Most of it is from {names} of "
            f"{len(found):,} samples, see {file}.{_ACTIONS[self.action]}"
        )


def _documents(trainer: L.Trainer, module: L.LightningModule) -> list[dict[str, Any]]:
    """The samples of this rank's step: what each adds to the summed loss, its mean nll, and its text."""
    documents = trainer.datamodule.train_set if isinstance(trainer.datamodule, S1KDataModule) else None
    found = []
    for batch, noised, nll in module.totals.parts:
        for number in batch.document_ids[noised.is_masked].unique():
            own = noised.is_masked & (batch.document_ids == number)  # [B, L]
            row, first = own.nonzero()[0].tolist()
            sample = int(batch.sample_ids[row, first])
            found.append(
                {
                    "id": str(sample) if documents is None else documents[sample].id,
                    "loss": float(module.loss(batch, noised, torch.where(own, nll, 0)).sum),
                    "nll": float(nll[own].mean()),
                    "t": float(noised.t[row, first]),
                    "masked": int(own.sum()),
                    "text": module.tokenizer.decode(batch.input_ids[row][batch.document_ids[row] == number]),
                }
            )
    return found
