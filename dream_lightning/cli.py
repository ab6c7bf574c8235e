"""LightningCLI over DreamModule and S1KDataModule."""

import argparse
import difflib
import gc
import itertools
import re
import sys
import warnings
from pathlib import Path
from typing import Any, NoReturn

import lightning as L
import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from rich.console import Console
from rich.table import Table

from dream_lightning.data import S1KDataModule
from dream_lightning.errors import UserError
from dream_lightning.module import DreamModule
from dream_lightning.plan.config import setting_from
from dream_lightning.plan.report import out_of_memory, report
from dream_lightning.readable_errors import readable_errors
from dream_lightning.training import Autosave, ProgressBar
from dream_lightning.training.checkpointing import SafeCheckpointIO

# In a folder of its own: jsonargparse starts Python there, where our types.py would stand in for the library's
BASE = Path(__file__).parent / "defaults" / "base.yaml"
# laid over it
PREDICT, EVALUATE = BASE.with_name("predict.yaml"), BASE.with_name("evaluate.yaml")


class _Commands(L.Trainer):
    """The Trainer, whose methods are the commands, and one that needs no Trainer."""

    @staticmethod
    def plan(
        ckpt_path: str | None = None, weights_only: bool | None = None, gpu_memory_gib: float | None = None
    ) -> None:
        """Say what fit would need of a GPU and what this machine has, in seconds; loads nothing.

        Args:
            ckpt_path: understood so that the options can be those of fit; changes nothing.
            weights_only: the same.
            gpu_memory_gib: memory of the card to plan for; by default that of this machine.
        """


class _Parser(LightningArgumentParser):
    """Says what is wrong with an option in a line or two, not behind four screens of usage."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """End with status 2."""
        for word in re.findall(r"--[\w.]+", message) if message.startswith("unrecognized arguments") else ():
            for near in difflib.get_close_matches(word, self._options(), n=1):
                message += f"\n{word}: did you mean {near}?"
        print(f"error: {message}\n(every option: python -m dream_lightning fit --help)", file=sys.stderr)
        self.exit(2)

    def _options(self) -> set[str]:
        commands = [a.choices.values() for a in self._actions if isinstance(a, argparse._SubParsersAction)]
        parsers = [self, *itertools.chain.from_iterable(commands)]
        return {option for parser in parsers for a in parser._actions for option in a.option_strings}


class DreamCLI(LightningCLI):
    """`python -m dream_lightning fit|validate|test|predict|plan --config …`; every config is laid over `base.yaml`."""

    def __init__(self) -> None:
        over = {"fit": [], "plan": [], "validate": [EVALUATE], "test": [EVALUATE], "predict": [PREDICT]}
        super().__init__(
            DreamModule,
            S1KDataModule,
            trainer_class=_Commands,
            parser_class=_Parser,
            save_config_kwargs={"overwrite": True},
            parser_kwargs={
                c: {"default_config_files": [str(file) for file in (BASE, *files)]} for c, files in over.items()
            },
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Lightning's, and `plan`."""
        return LightningCLI.subcommands() | {"plan": set()}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The tokenizer is the model's; two checkpoints: the best by a metric, the newest every few steps."""
        parser.link_arguments("model.tokenizer", "data.tokenizer", apply_on="instantiate")
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.add_lightning_class_args(Autosave, "autosave")

    def _parse_ckpt_path(self) -> None:
        """Lightning would read the whole checkpoint, 46 GB of a full run, for options that ours do not hold."""

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Checkpoints are whole or not there, unless `trainer.plugins` names another way to write them."""
        options = self._get(self.config_init, "trainer")
        if options.enable_progress_bar is False and options.callbacks:  # base.yaml's bar would contradict it
            options.callbacks = [c for c in options.callbacks if not isinstance(c, ProgressBar)]
        trainer = super().instantiate_trainer(**kwargs)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = SafeCheckpointIO()
        return trainer

    def after_validate(self) -> None:
        """Print the scores once: Lightning's own table has a column for each dataloader, all with the same numbers."""
        if not self.trainer.is_global_zero:
            return
        table = Table("score", "value")
        for name, value in sorted(self.trainer.callback_metrics.items()):
            table.add_row(name, f"{float(value):.5g}")
        Console().print(table)

    after_test = after_validate

    def instantiate_classes(self) -> None:
        """`plan` builds nothing: its configuration may be for GPUs that this machine lacks."""
        if self.subcommand == "plan":
            print(report(setting_from(self.config.plan), self.config.plan.gpu_memory_gib))
            return
        _check_gpu(self.config[self.subcommand].trainer.accelerator)
        super().instantiate_classes()

    def _run_subcommand(self, subcommand: str) -> None:
        if subcommand == "plan":
            return
        if subcommand != "fit" and self.config[subcommand].get("ckpt_path") == "last":
            _check_last(self.trainer)
        try:
            super()._run_subcommand(subcommand)
        except torch.OutOfMemoryError as error:
            raise UserError(out_of_memory(setting_from(self.config[subcommand]), error)) from error


def _check_last(trainer: L.Trainer) -> None:
    """Lightning would score or ask the weights that training starts from, and say so in a line among many."""
    if not any(callback._find_last_checkpoints(trainer) for callback in trainer.checkpoint_callbacks):
        folders = ", ".join(sorted({str(callback.dirpath) for callback in trainer.checkpoint_callbacks}))
        raise UserError(
            f"ckpt_path is `last` and there is no last.ckpt in {folders}: train first, set autosave.dirpath to the "
            "folder of the run, or name a file; without ckpt_path the weights before training are meant"
        )


def _check_gpu(accelerator: object) -> None:
    if accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
        raise UserError(
            f"trainer.accelerator is {accelerator} and torch sees no GPU: look at nvidia-smi and CUDA_VISIBLE_DEVICES, "
            f"install a CUDA build of torch (this one is {torch.__version__}), or set --trainer.accelerator=cpu"
        )


# True elsewhere, not here: batches are made in microseconds from memory-mapped ids, scores are summed over processes
# before they are logged, and two of Lightning's own calls.
_NOISE = (
    "does not have many workers",
    "It is recommended to use .self.log.*sync_dist",
    "isinstance.treespec, LeafSpec",
    "exists and is not empty",
)


def tune_gc() -> None:
    """Let Python search all objects for garbage a hundred times more rarely than it would.

    Imports made 600,000, the compiler 200,000 more; they stay, and a search, 0.2 to 0.5 s, lets a GPU stand still.
    """
    gc.freeze()
    new, young, _ = gc.get_threshold()
    gc.set_threshold(new, young, 1000)


def main() -> None:
    """Entry point of `python -m dream_lightning`."""
    for message in _NOISE:
        warnings.filterwarnings("ignore", f".*{message}")
    with readable_errors():
        DreamCLI()
