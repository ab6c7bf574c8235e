"""Answers of the validation as texts in the logger: what the model says, and how it got there."""

import re

import lightning as L
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from torch import Tensor

from dream_lightning.batch import Answers, Prediction

_MASK = "▒"
_WIDTH = 100  # characters of a line: TensorBoard does not wrap code
_IN_TABLE, _WHOLE = 200, 2000  # characters shown of a text: 8 whole answers of 8,192 tokens would be about 200,000


class SampleLogger(L.Callback):
    """Log some validation answers and one denoising history as text, at every validation.

    TensorBoard shows them in its Text tab, of a long one both ends; Weights & Biases gets a table of whole texts. Other
    loggers cannot hold texts and get none.

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
        rows = [
            {
                "question": p.prompt,
                "answer": "(unparsed)" if p.answer is None else p.answer,
                "reference": "–" if p.reference is None else p.reference,
                "correct": {True: "yes", False: "no", None: "–"}[p.correct],
                "response": p.prediction,
            }
            for p in self._predictions
        ]
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_text("val/samples", _markdown(rows), pl_module.trained_steps)
                if self._history:
                    logger.experiment.add_text("val/denoising", self._history, pl_module.trained_steps)
            elif isinstance(logger, WandbLogger):
                texts = [list(row.values()) for row in rows]
                logger.log_text("val/samples", list(rows[0]), texts, step=pl_module.trained_steps)
                if self._history:
                    logger.log_text("val/denoising", ["history"], [[self._history]], step=pl_module.trained_steps)

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
            text = _shorten(_LINE_END.sub("↵", text), _WHOLE) + (f"∎×{final_eos}" if final_eos else "")
            head = f"step {step + 1:>{len(str(steps))}}/{steps}: "
            lines += _code(text, head)
        return "\n".join(lines)


_LINE_END = re.compile(r"\r\n?|\n")
_MARKUP = re.compile(r"[\\`*_\[\]<>&|]")  # what Markdown, its tables or HTML would act on


def _markdown(rows: list[dict[str, str]]) -> str:
    """All but the responses as a table to look over, then each question with its response."""
    columns = [name for name in rows[0] if name != "response"]
    table = [["", *columns]] + [[str(n), *(row[c] for c in columns)] for n, row in enumerate(rows, start=1)]
    lines = ["| " + " | ".join(map(_cell, cells)) + " |" for cells in table]
    lines.insert(1, "|" + "---|" * len(table[0]))
    for n, row in enumerate(rows, start=1):
        text = _shorten(row["question"], _WHOLE) + "\n\n" + _shorten(row["response"], _WHOLE)
        lines += ["", f"Response {n}", "", *_code(text)]
    return "\n".join(lines)


def _cell(text: str) -> str:
    """The text as it is, LaTeX and tags included, for a cell of a Markdown table."""
    escaped = _MARKUP.sub(lambda match: f"&#{ord(match[0])};", _shorten(text, _IN_TABLE))
    return _LINE_END.sub("<br>", escaped).replace("  ", "&nbsp;&nbsp;")


def _code(text: str, head: str = "") -> list[str]:
    """Lines of a Markdown code block, broken where they are too wide, after `head`."""
    broken = [line[i : i + _WIDTH] for line in _LINE_END.split(text) for i in range(0, max(1, len(line)), _WIDTH)]
    return [f"    {head if n == 0 else ' ' * len(head)}{line}" for n, line in enumerate(broken)]


def _shorten(text: str, longest: int) -> str:
    if len(text) <= longest:
        return text
    return f"{text[: longest // 2]} [… {len(text) - longest // 2 * 2:,} characters …] {text[-(longest // 2) :]}"
