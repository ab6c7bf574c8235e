"""Answers of the validation as texts in the logger: what the model says, and how it got there."""

import re

import lightning as L
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from torch import Tensor

from dream_lightning.types import Answers, Prediction

_MASK = "▒"
_LONGEST = 2000  # characters of a text shown in TensorBoard: 8 answers of 8,192 tokens would fill 60 screens
_WIDTH = 120  # characters of a line of the denoising history; TensorBoard does not wrap code


class SampleLogger(L.Callback):
    """Log some validation answers and one denoising history as text, at every validation.

    TensorBoard shows them in its Text tab, of a long one both ends; Weights & Biases gets a table of whole texts. Other
    loggers hold no texts and get none.

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
        counted = [p for p, counts in zip(outputs.predictions, outputs.counted, strict=True) if counts]
        self._predictions += counted[: self.count - len(self._predictions)]
        if outputs.history is not None and self._history is None:
            states = outputs.history[:, 0, outputs.prompt_length :]  # [S, N]
            self._history = self._as_text(states, pl_module.tokenizer)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write what was collected."""
        if not self._predictions or trainer.sanity_checking or not trainer.is_global_zero:
            return
        columns = ["question", "answer", "reference", "correct", "whole response"]
        rows = [
            [
                p.prompt,
                "(unparsed)" if p.answer is None else p.answer,
                "–" if p.reference is None else p.reference,
                {True: "yes", False: "no", None: "–"}[p.correct],
                p.prediction,
            ]
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
        """The states at a few moments as a Markdown code block: ▒ a mask, ↵ a line's end, ∎ eos."""
        steps, eos = len(states), tokenizer.eos_token_id
        moments = sorted({round(i * (steps - 1) / max(1, self.moments - 1)) for i in range(self.moments)})
        lines = []
        for step in moments:
            tokens = states[step].tolist()
            final_eos = next((i for i, token in enumerate(reversed(tokens)) if token != eos), len(tokens))
            text = tokenizer.decode(tokens[: len(tokens) - final_eos], skip_special_tokens=False)
            text = text.replace(tokenizer.mask_token, _MASK).replace(tokenizer.eos_token, "∎")
            text = _shorten(_LINE_END.sub("↵", text)) + (f"∎×{final_eos}" if final_eos else "")
            head = f"    step {step + 1:>{len(str(steps))}}/{steps}: "
            pieces = [text[i : i + _WIDTH] for i in range(0, len(text), _WIDTH)]
            lines.append(head + ("\n" + " " * len(head)).join(pieces))
        return "\n".join(lines)


_LINE_END = re.compile(r"\r\n?|\n")
_MARKUP = re.compile(r"[\\`*_\[\]<>&|]")  # what Markdown, its tables or HTML would act on


def _markdown(columns: list[str], rows: list[list[str]]) -> str:
    def cells(values: list[str]) -> str:
        return "| " + " | ".join(_cell(v) for v in values) + " |"

    return "\n".join([cells(columns), "|" + "---|" * len(columns), *map(cells, rows)])


def _cell(text: str) -> str:
    """The text as it is, LaTeX and tags included, for a cell of a Markdown table."""
    escaped = _MARKUP.sub(lambda match: f"&#{ord(match[0])};", _shorten(text))
    return _LINE_END.sub("<br>", escaped).replace("  ", "&nbsp;&nbsp;")


def _shorten(text: str) -> str:
    half = _LONGEST // 2
    if len(text) <= _LONGEST:
        return text
    return f"{text[:half]} [… {len(text) - _LONGEST:,} characters …] {text[-half:]}"
