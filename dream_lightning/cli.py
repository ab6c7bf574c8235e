"""The program `dream-lightning`: LightningCLI over DreamModule and S1KDataModule, and the commands around it."""

import difflib
import gc
import os
import re
import shutil
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import lightning as L
import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from rich.console import Console
from rich.table import Table

from dream_lightning.atomic import disk_refuses
from dream_lightning.data import S1KDataModule
from dream_lightning.errors import UserError
from dream_lightning.memory import out_of_memory, report, setting_from
from dream_lightning.module import DreamModule
from dream_lightning.training import Autosave, ProgressBar
from dream_lightning.training.checkpointing import SafeCheckpointIO
from dream_lightning.viewer import commands

# A folder of its own: jsonargparse changes into the folder of a config.
DEFAULTS = Path(__file__).parent / "defaults"
# In a wheel the shipped configs are package data; in a checkout they are the folder next to the package.
CONFIGS = next(p / "configs" for p in Path(__file__).parents if (p / "configs").is_dir())
TRACEBACK = "DREAM_TRACEBACK"  # environment variable: with 1 every error shows its traceback


class _Parser(LightningArgumentParser):
    """Reports a wrong option in one or two lines, with a guess, instead of several screens of usage."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Exit with status 2."""
        if message.startswith("unrecognized arguments"):
            known = {o for parser in getattr(self, "family", [self]) for o in _options(parser.format_help())}
            for word in _options(message):
                for near in difflib.get_close_matches(word, known, n=1):
                    message += f"\n{word}: did you mean {near}?"
        command = " ".join(sys.argv[1:2])
        print(f"error: {message}\n(every option: dream-lightning {command} --help)", file=sys.stderr)
        self.exit(2)


def _options(text: str) -> list[str]:
    return re.findall(r"--[\w.]+", text)


class _Trainer(L.Trainer):
    """The Trainer, whose methods are the commands, and one command that needs no Trainer."""

    @staticmethod
    def plan(
        ckpt_path: str | None = None, weights_only: bool | None = None, gpu_memory_gib: float | None = None
    ) -> None:
        """Report how much GPU memory fit needs and what this machine has. Loads nothing.

        Args:
            ckpt_path: accepted so that the options can be those of fit; has no effect.
            weights_only: likewise.
            gpu_memory_gib: memory of the card to plan for. Default: that of this machine.
        """


class DreamCLI(LightningCLI):
    """One command of the Trainer. Every config is merged into `defaults/base.yaml`.

    Args:
        command: fit, validate, test, predict or plan.
    """

    def __init__(self, command: str) -> None:
        extra = {"validate": ["evaluate"], "test": ["evaluate"], "predict": ["predict"]}.get(command, [])
        files = [str(DEFAULTS / f"{name}.yaml") for name in ("base", *extra)]
        self.command, self.parsers = command, []
        try:
            super().__init__(
                DreamModule,
                S1KDataModule,
                trainer_class=_Trainer,
                parser_class=_Parser,
                save_config_kwargs={"overwrite": True},
                parser_kwargs={command: {"default_config_files": files}, "prog": "dream-lightning"},
            )
        except torch.OutOfMemoryError as error:
            raise UserError(out_of_memory(setting_from(self.options), error)) from error

    def subcommands(self) -> dict[str, set[str]]:
        """Only the one that runs: building a parser takes a second."""
        return {self.command: LightningCLI.subcommands().get(self.command, set())}

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Each parser knows all of them, for guesses at a wrong option."""
        parser = super().init_parser(**kwargs)
        self.parsers.append(parser)
        parser.family = self.parsers
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The data takes the model's tokenizer. There are two checkpoints: the best by a metric, and the newest."""
        parser.link_arguments("model.tokenizer", "data.tokenizer", apply_on="instantiate")
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.add_lightning_class_args(Autosave, "autosave")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, and keep the options of the command."""
        super().parse_arguments(parser, args)
        self.options = self.config[self.command]

    def _parse_ckpt_path(self) -> None:
        """Not done: Lightning reads the whole checkpoint (46 GB) for hyperparameters that it does not hold."""

    def before_instantiate_classes(self) -> None:
        """Check what can be checked before anything is loaded; `plan` ends here."""
        if self.command == "plan":
            print(report(setting_from(self.options), self.options.gpu_memory_gib))
            raise SystemExit(0)
        if self.options.trainer.accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
            raise UserError(
                f"trainer.accelerator is {self.options.trainer.accelerator} and torch sees no GPU: look at nvidia-smi "
                f"and CUDA_VISIBLE_DEVICES, install a CUDA build of torch (this one is {torch.__version__}), or set "
                "--trainer.accelerator=cpu"
            )
        folders = {self.options.checkpoint.dirpath, self.options.autosave.dirpath}
        is_last = self.command != "fit" and self.options.ckpt_path == "last" and None not in folders
        if is_last and not any(list(Path(folder).glob("last*.ckpt")) for folder in folders):
            raise UserError(  # Lightning would warn and use the initial weights
                f"ckpt_path is `last` and there is no last.ckpt in {', '.join(sorted(folders))}: train first, set "
                "autosave.dirpath to the folder of the run, or name a file; without ckpt_path the initial weights are "
                "used"
            )

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Checkpoints are written atomically, unless `trainer.plugins` names another way."""
        options = self.config_init[self.command].trainer
        if options.enable_progress_bar is False and options.callbacks:  # the bar in base.yaml would contradict it
            options.callbacks = [c for c in options.callbacks if not isinstance(c, ProgressBar)]
        trainer = super().instantiate_trainer(**kwargs)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = SafeCheckpointIO()
        return trainer

    def after_validate(self) -> None:
        """Print the scores once: Lightning's own table repeats them in a column for each dataloader."""
        if not self.trainer.is_global_zero:
            return
        table = Table("score", "value")
        for name, value in sorted(self.trainer.callback_metrics.items()):
            table.add_row(name, f"{float(value):.5g}")
        Console().print(table)

    after_test = after_validate


def shipped_configs() -> dict[str, Path]:
    """Name (such as `tiny` or `model/float8`) → file."""
    return {str(f.relative_to(CONFIGS).with_suffix("")): f for f in sorted(CONFIGS.rglob("*.yaml"))}


def configs(parser: LightningArgumentParser, arguments: list[str]) -> None:
    """List the shipped configs; `configs copy NAME` copies one into the current folder."""
    parser.add_argument("words", nargs="*", type=str, default=[], help="nothing, or: copy NAME")
    words, shipped = parser.parse_args(arguments).words, shipped_configs()
    if not words:
        for name, file in shipped.items():
            print(f"{name:24} {file.read_text(encoding='utf-8').splitlines()[0].lstrip('# ')}")
        return
    if len(words) != 2 or words[0] != "copy":
        raise UserError(f"got configs {' '.join(words)}, wanted nothing or: configs copy NAME")
    file = Path(config_path(words[1]))
    if Path(file.name).exists():
        raise UserError(f"{file.name} exists here: rename it first")
    shutil.copyfile(file, file.name)
    print(f"wrote {file.name}: --config {file.name}")


def config_path(name: str) -> str:
    """The file of a shipped config's name; anything else, such as a path, is returned unchanged.

    Raises:
        UserError: neither a file nor a shipped config.
    """
    shipped = shipped_configs()
    if Path(name).is_file() or ":" in name or "{" in name:  # a file, or YAML in place of one
        return name
    if name in shipped:
        return str(shipped[name])
    near = difflib.get_close_matches(name.removesuffix(".yaml"), shipped, n=1)
    guess = f"did you mean {near[0]}? " if near else ""
    raise UserError(f"config {name} is neither a file nor shipped: {guess}`dream-lightning configs` lists them")


TRAINER_COMMANDS = {
    "fit": "Train, or resume with --ckpt_path last.",
    "validate": "Likelihood and scored answers of a checkpoint.",
    "test": "The same, logged as test/….",
    "predict": "Answer questions into a JSON-lines file.",
    "plan": "Report the GPU memory that fit needs.",
}
COMMANDS: dict[str, Callable[[LightningArgumentParser, list[str]], None]] = {
    "chat": commands.chat,
    "show-denoising": commands.show_denoising,
    "data-report": commands.data_report,
    "show": commands.show,
    "export": commands.export,
    "configs": configs,
}


def run(arguments: list[str]) -> None:
    """Run one command."""
    summaries = TRAINER_COMMANDS | {name: f.__doc__.splitlines()[0] for name, f in COMMANDS.items()}
    command, *rest = arguments or ["--help"]
    if command in ("-h", "--help"):
        print("usage: dream-lightning COMMAND [options]; dream-lightning COMMAND --help lists the options\n")
        for name, summary in summaries.items():
            print(f"  {name:16} {summary}")
    elif command in COMMANDS:
        function = COMMANDS[command]
        function(_Parser(prog=f"dream-lightning {command}", description=function.__doc__), rest)
    elif command in TRAINER_COMMANDS:
        for i, word in enumerate(rest):
            if word.startswith("--config="):
                rest[i] = f"--config={config_path(word.removeprefix('--config='))}"
            elif i and rest[i - 1] in ("-c", "--config"):
                rest[i] = config_path(word)
        sys.argv[1:] = [command, *rest]  # Lightning starts the other processes with it
        DreamCLI(command)
    else:
        near = difflib.get_close_matches(command, summaries, n=1)
        raise UserError(f"there is no command {command}: " + (f"did you mean {near[0]}?" if near else "see --help"))


@contextmanager
def readable_errors() -> Iterator[None]:
    """On an error that users can correct, print its message alone and exit with status 1; all others propagate.

    These are `UserError`, errors of Lightning, jsonargparse and optimizers about their options, and disks that are full
    or must not be written.
    """
    try:
        yield
    except Exception as error:
        message = _for_users(error)
        if os.environ.get(TRACEBACK) == "1" or message is None:
            raise
        print(f"error: {message}\n({TRACEBACK}=1 shows the traceback)", file=sys.stderr)
        raise SystemExit(1) from error


def _for_users(error: BaseException) -> str | None:
    """The innermost message for users in the chain of causes: the parser wraps what classes raise."""
    chain = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    if isinstance(error, OSError) and disk_refuses(error):
        return (
            f"{error}: free some space, or choose other folders: trainer.logger.init_args.save_dir for logs, "
            "data.cache_dir for tokenized data. Checkpoints that were written are complete: resume with --ckpt_path "
            "last"
        )
    for kind in (UserError, MisconfigurationException, ValueError):
        for e in reversed(chain):
            if isinstance(e, kind) and (kind is not ValueError or _is_about_options(e)):
                return str(e)
    return None


def _is_about_options(error: ValueError) -> bool:
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return frame.f_globals["__name__"].startswith(("torch.optim.", "jsonargparse.", "lightning.pytorch.trainer."))


# True in general but not here: batches are made in microseconds from memory-mapped ids, and scores are summed over
# processes before they are logged. The last two come from Lightning itself.
_WARNINGS = (
    "does not have many workers",
    "It is recommended to use .self.log.*sync_dist",
    "exists and is not empty",
    "isinstance.treespec, LeafSpec",
)


def tune_gc() -> None:
    """Run the full garbage collector a hundred times less often.

    Imports and compilation leave some 800,000 long-lived objects. Traversing them takes 0.2 to 0.5 s, in which the GPU
    is idle.
    """
    gc.freeze()
    young, middle, _ = gc.get_threshold()
    gc.set_threshold(young, middle, 1000)


def main() -> None:
    """Entry point of `dream-lightning` and `python -m dream_lightning`."""
    tune_gc()
    for message in _WARNINGS:
        warnings.filterwarnings("ignore", f".*{message}")
    with readable_errors():
        run(sys.argv[1:])
