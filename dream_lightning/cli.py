"""LightningCLI over DreamModule and S1KDataModule."""

import warnings
from pathlib import Path
from typing import Any

import lightning as L
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from rich.console import Console
from rich.table import Table

from dream_lightning.callbacks import Autosave
from dream_lightning.data import S1KDataModule
from dream_lightning.module import DreamModule
from dream_lightning.saving import SafeCheckpointIO

# In a folder of its own: jsonargparse starts Python there, where our types.py would stand in for the library's
BASE = Path(__file__).parent / "defaults" / "base.yaml"
# laid over it
PREDICT, EVALUATE = BASE.with_name("predict.yaml"), BASE.with_name("evaluate.yaml")


class DreamCLI(LightningCLI):
    """`python -m dream_lightning fit|validate|test|predict --config …`; every config is laid over `base.yaml`."""

    def __init__(self) -> None:
        over = {"fit": [], "validate": [EVALUATE], "test": [EVALUATE], "predict": [PREDICT]}
        super().__init__(
            DreamModule,
            S1KDataModule,
            save_config_kwargs={"overwrite": True},
            parser_kwargs={
                c: {"default_config_files": [str(file) for file in (BASE, *files)]} for c, files in over.items()
            },
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The tokenizer is the model's; two checkpoints: the best by a metric, the newest every few steps."""
        parser.link_arguments("model.tokenizer", "data.tokenizer", apply_on="instantiate")
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.add_lightning_class_args(Autosave, "autosave")

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Checkpoints are whole or not there, unless `trainer.plugins` names another way to write them."""
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


# True elsewhere, not here: batches are made in microseconds from memory-mapped ids, and two of Lightning's own calls.
_NOISE = ("does not have many workers", "isinstance.treespec, LeafSpec", "exists and is not empty")


def main() -> None:
    """Entry point of `python -m dream_lightning`."""
    for message in _NOISE:
        warnings.filterwarnings("ignore", f".*{message}")
    DreamCLI()
