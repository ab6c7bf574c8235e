"""Answers of the validation as texts in the logger: what the model says, and how it got there."""

import lightning as L
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from torch import Tensor

from dream_lightning.types import Answers, Prediction

_MASK = "▒"


class SampleLogger(L.Callback):
    """Log some validation answers and one denoising history as text, at every validation.

    TensorBoard shows them in its Text tab; Weights & Biases gets a table. Other loggers have no texts: a note says so.

    Args:
        count: answers to log.
        moments: how many states of the denoising history to show.
    """

    def __init__(self, count: int = 8, moments: int = 8) -> None:
        self.count, self.moments = count, moments
        self._predictions: list[Prediction] = []
        self._history: str | None = None

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Forget the last validation's."""
        self._predictions, self._history = [], None

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs, batch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Collect until there are enough."""
        if not isinstance(outputs, Answers):
            return
        self._predictions += outputs.predictions[: self.count - len(self._predictions)]
        if outputs.history is not None and self._history is None:
            states = outputs.history[:, 0, outputs.prompt_length :]  # [S, N]
            self._history = self._as_text(states, pl_module.tokenizer)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write what was collected."""
        if not self._predictions or trainer.sanity_checking or not trainer.is_global_zero:
            return
        columns = ["question", "prediction", "reference", "correct"]
        rows = [
            [p.prompt, p.prediction, p.reference or "–", {True: "yes", False: "no", None: "–"}[p.correct]]
            for p in self._predictions
        ]
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_text("val/samples", _markdown(columns, rows), trainer.global_step)
                if self._history:
                    logger.experiment.add_text("val/denoising", self._history, trainer.global_step)
            elif isinstance(logger, WandbLogger):
                logger.log_text("val/samples", columns=columns, data=rows, step=trainer.global_step)
                if self._history:
                    logger.log_text("val/denoising", ["history"], [[self._history]], step=trainer.global_step)

    def _as_text(self, states: Tensor, tokenizer) -> str:
        """The states at a few moments as a Markdown code block, masks as shaded squares."""
        steps = len(states)
        moments = sorted({round(i * (steps - 1) / max(1, self.moments - 1)) for i in range(self.moments)})
        lines = []
        for step in moments:
            tokens = states[step].tolist()
            eos = tokenizer.eos_token_id
            while tokens and tokens[-1] == eos:
                tokens.pop()
            text = tokenizer.decode(tokens, skip_special_tokens=False).replace(tokenizer.mask_token, _MASK)
            text = text.replace(tokenizer.eos_token, "∎").replace("\n", "↵")
            lines.append(f"    step {step + 1:>4}/{steps}: {text}")
        return "\n".join(lines)


def _markdown(columns: list[str], rows: list[list[str]]) -> str:
    def cells(values: list[str]) -> str:
        return "| " + " | ".join(_cell(v) for v in values) + " |"

    return "\n".join([cells(columns), "|" + "---|" * len(columns), *map(cells, rows)])


def _cell(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("|", r"\|").replace("\n", "<br>")
