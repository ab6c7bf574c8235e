"""Answers of the validation as texts in the logger."""

import re
import textwrap
from typing import Any

import lightning as L
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dream_lightning.batch import Answers, Prediction
from dream_lightning.errors import check_range

_STATES = 8  # of the denoising history
_WIDTH = 100  # characters in a line: TensorBoard does not wrap code
_LONGEST = 2000  # characters shown of a text
_LINE_END = re.compile(r"\r\n?|\n")


class SampleLogger(L.Callback):
    """Log `count` validation answers and one denoising history as text, at every validation.

    TensorBoard shows them in its Text tab, long texts shortened in the middle; Weights & Biases gets a table of whole
    texts. Other loggers get none.
    """

    def __init__(self, count: int = 8) -> None:
        check_range("SampleLogger's count", count, least=0, whole=True)
        self.count = count
        self._predictions: list[Prediction] = []
        self._history = ""

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._predictions, self._history = [], ""

    def on_validation_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *args) -> None:
        if not isinstance(outputs, Answers):
            return
        counted = [p for p, counts in zip(outputs.predictions, outputs.counted, strict=True) if counts]
        self._predictions += counted[: self.count - len(self._predictions)]
        if outputs.history is not None and not self._history:
            self._history = history_text(outputs.history[:, 0, outputs.prompt_length :], pl_module.tokenizer)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self._predictions or trainer.sanity_checking or not trainer.is_global_zero:
            return
        step = pl_module.logged_step
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_text("val/samples", samples_text(self._predictions), step)
                logger.experiment.add_text("val/denoising", self._history, step)
            elif hasattr(logger, "log_text"):  # WandbLogger's
                columns = ["question", "answer", "reference", "correct", "response"]
                rows = [
                    [p.prompt, p.answer, p.target or p.reference, str(p.correct), p.prediction]
                    for p in self._predictions
                ]
                logger.log_text("val/samples", columns, rows, step=step)
                logger.log_text("val/denoising", ["history"], [[self._history]], step=step)


def samples_text(predictions: list[Prediction]) -> str:
    """Markdown: a code block for each answer, in which TensorBoard shows every character unmodified."""
    verdicts = {True: "correct", False: "wrong", None: "not scored"}
    blocks = []
    for number, p in enumerate(predictions, start=1):
        answer = "(unparsed)" if p.answer is None else p.answer
        head = f"{number}. {verdicts[p.correct]}: answer {answer}, reference {p.target or p.reference}"
        blocks.append(_code("\n\n".join(map(_shorten, (head, p.prompt, p.prediction)))))
    return "\n\n---\n\n".join(blocks)


def history_text(states: Tensor, tokenizer: PreTrainedTokenizerBase) -> str:
    """Some of the states [S, N] as a Markdown code block: ▒ is a mask, ↵ a line end, ∎ eos."""
    steps, eos = len(states), tokenizer.eos_token_id
    blocks = []
    for step in sorted({round(i * (steps - 1) / (_STATES - 1)) for i in range(_STATES)}):
        tokens = states[step].tolist()
        final_eos = next((i for i, token in enumerate(reversed(tokens)) if token != eos), len(tokens))
        text = tokenizer.decode(tokens[: len(tokens) - final_eos], skip_special_tokens=False)
        text = text.replace(tokenizer.mask_token, "▒").replace(tokenizer.eos_token, "∎")
        text = _shorten(_LINE_END.sub("↵", text)) + (f"∎×{final_eos}" if final_eos else "")
        blocks.append(_code(text, head=f"step {step + 1:>{len(str(steps))}}/{steps}: "))
    return "\n".join(blocks)


def _code(text: str, head: str = "") -> str:
    """A Markdown code block after `head`; long lines are broken between words, no character is lost."""
    whole = {"replace_whitespace": False, "drop_whitespace": False, "expand_tabs": False, "break_on_hyphens": False}
    broken = [part for line in _LINE_END.split(text) for part in textwrap.wrap(line, _WIDTH, **whole) or [""]]
    return "\n".join(f"    {' ' * len(head) if n else head}{line}" for n, line in enumerate(broken))


def _shorten(text: str) -> str:
    half, left_out = _LONGEST // 2, len(text) - _LONGEST
    return text if left_out <= 0 else f"{text[:half]} [… {left_out:,} characters …] {text[-half:]}"
