"""The program `dream-lightning`: LightningCLI over DreamModule and S1KDataModule, and the commands around it."""

import gc
import os
import re
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from argparse import SUPPRESS
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NoReturn

import lightning as L
import torch
import yaml
from jsonargparse import set_parsing_settings
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger

from dream_lightning.adapters import LoraParams
from dream_lightning.atomic import check_folder, disk_refuses, lock_file
from dream_lightning.commands import COMMANDS, SUMMARIES, TRAINER_COMMANDS, check_command
from dream_lightning.data import S1KDataModule
from dream_lightning.errors import UserError, check_range, guess, reading, visible
from dream_lightning.locate import with_checkpoint
from dream_lightning.memory import out_of_memory, report, setting_from
from dream_lightning.module import DreamModule
from dream_lightning.sampling import SamplingParams
from dream_lightning.training import Autosave, ProgressBar
from dream_lightning.training.checkpointing import SafeCheckpointIO, check_keyword
from dream_lightning.training.summary import score_lines
from dream_lightning.validation_cost import plan_validation

set_parsing_settings(docstring_parse_attribute_docstrings=True)  # for the fields of SamplingParams and LoraParams

DEFAULTS = Path(__file__).parent / "defaults"  # a separate folder: jsonargparse changes into that of a config
# Package data in a wheel, the folder next to the package in a checkout.
CONFIGS = next(p / "configs" for p in Path(__file__).parents if (p / "configs").is_dir())
_PARTS = ("trainer.", "loops.", "strategies.", "accelerators.", "callbacks.", "loggers.", "plugins.", "profilers.")
_TOLD = {  # kind of error → the modules in which it is about an option, and not a bug
    UserError: "",
    MisconfigurationException: "",
    ValueError: ("torch.optim.", "jsonargparse.", "lightning.fabric.", *(f"lightning.pytorch.{p}" for p in _PARTS)),
    TypeError: ("lightning.fabric.accelerators.", "lightning.pytorch.accelerators."),
    RecursionError: ("json.", "yaml.", "jsonargparse."),
}
_LONGEST = 2000  # characters of a message
DIED = "a process died, or cannot be reached: see what it printed; resume with --ckpt_path last, or run predict again"
TRACEBACK = "DREAM_TRACEBACK"  # environment variable; 1 shows the traceback of every error


class _Parser(LightningArgumentParser):
    """Reports a wrong option in one or two lines, with a guess, instead of several screens of usage."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if message.startswith("unrecognized arguments"):
            known = set(_options(getattr(self, "of_command", self).format_help()))
            message += "".join(f"\n{word}: {near}" for word in _options(message) if (near := guess(word, known)))
        if unknown := re.search(r"Option '(\w+)' is not accepted", message):  # a key of a nested option
            known = [field.name for kind in (LoraParams, SamplingParams) for field in fields(kind)]
            given = next((f" in {word}" for word in sys.argv if re.search(rf"[{{,. ]{unknown[1]} *[:=]", word)), "")
            message += f"{given}: {guess(unknown[1], known)}".rstrip(": ")
        command = " ".join(sys.argv[1:2])
        print(f"error: {_shown(message)}\n(every option: dream-lightning {command} --help)", file=sys.stderr)
        self.exit(2)

    def format_help(self) -> str:
        shown = self.get_defaults()
        for action in self._actions:  # Lightning's descriptions are written for Sphinx
            action.help = action.help and re.sub(r":\w+:`~?(?:[\w.]+\.)?(\w+)`", r"`\1`", action.help)
            if action.help == SUPPRESS:  # in a docstring
                action.help = SUPPRESS  # the same object, as argparse wants it
            value = shown.get(action.dest)
            if isinstance(value, list) and value and all(hasattr(v, "class_path") for v in value):
                shown[action.dest] = ", ".join(v.class_path.rpartition(".")[2] for v in value)
        self.get_defaults = lambda: shown  # jsonargparse prints these; parsing needs the classes themselves
        try:
            return re.sub(r"<function (\w+)\s+at\s+0x\w+>", r"\1", super().format_help())
        finally:
            del self.get_defaults

    def parse_args(self, *args: Any, **kwargs: Any) -> Any:
        options = super().parse_args(*args, **kwargs)
        _check_numbers(options.as_dict())
        return options


def _check_numbers(value: Any, name: str = "") -> None:
    """Raise UserError for a number in the options that is not finite, or needs more than 64 bits."""
    if isinstance(value, dict | list):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            _check_numbers(part, f"{name}.{key}".lstrip("."))
    elif isinstance(value, int | float) and not isinstance(value, bool):
        check_range(name, value, **({"least": -(2**63), "most": 2**63 - 1} if isinstance(value, int) else {}))


def _shown(message: str) -> str:
    return visible(message if len(message) <= _LONGEST else f"{message[: _LONGEST // 2]} … {message[-_LONGEST // 2 :]}")


def _options(text: str) -> list[str]:
    return re.findall(r"--[\w.]+", text)


class _Trainer(L.Trainer):
    """The Trainer, whose methods are commands, and one more command."""

    @staticmethod
    def plan(ckpt_path: Any = None, weights_only: Any = None, gpu_memory_gib: float | None = None) -> None:
        """Report how much GPU memory fit needs and what this machine has.

        Args:
            ckpt_path: ==SUPPRESS==
            weights_only: ==SUPPRESS==
            gpu_memory_gib: memory of the GPU to plan for. Default: that of this machine.
        """


class DreamCLI(LightningCLI):
    """One of `TRAINER_COMMANDS`; configs are merged into `defaults/base.yaml`."""

    def __init__(self, command: str) -> None:
        extra = {"validate": ["evaluate"], "test": ["evaluate"], "predict": ["predict"]}.get(command, [])
        files = [str(DEFAULTS / f"{name}.yaml") for name in ("base", *extra)]
        self.command = command
        try:
            super().__init__(
                DreamModule,
                S1KDataModule,
                trainer_class=_Trainer,
                parser_class=_Parser,
                save_config_callback=SaveConfigCallback if command == "fit" else None,
                save_config_kwargs={"overwrite": True},
                auto_configure_optimizers=False,  # model.optimizer is the optimizer
                parser_kwargs={command: {"default_config_files": files}, "prog": "dream-lightning"},
            )
        except torch.OutOfMemoryError as error:
            raise UserError(out_of_memory(setting_from(self.config[command]), error)) from error

    def subcommands(self) -> dict[str, set[str]]:
        # Only the one that runs: building a parser takes a second.
        return {self.command: LightningCLI.subcommands().get(self.command, set())}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        self.parser.of_command = parser  # for guesses at a wrong option
        parser.link_arguments("model.tokenizer", "data.tokenizer", apply_on="instantiate")
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.add_lightning_class_args(Autosave, "autosave")

    def _parse_ckpt_path(self) -> None:
        """Do nothing: Lightning reads the whole checkpoint (46 GB) for hyperparameters that it does not hold."""

    def before_instantiate_classes(self) -> None:
        """Check the options before anything is loaded; `plan` ends here."""
        options = self.config[self.command]
        if self.command == "plan":
            check_range("gpu_memory_gib", options.gpu_memory_gib, least=0)
            setting = setting_from(options)
            print(report(setting, options.gpu_memory_gib))
            print(plan_validation(options, setting))
            raise SystemExit(0)
        self._check_outputs(options)
        trainer = options.trainer
        if trainer.accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
            raise UserError(
                f"trainer.accelerator is {trainer.accelerator}, and torch sees no GPU: set it to auto or cpu"
            )
        if str(trainer.devices) == "-1" and (trainer.accelerator == "cpu" or not torch.cuda.is_available()):
            raise UserError("trainer.devices is -1, which means all GPUs, and none is used: set it to 1")

    def _check_outputs(self, options: Any) -> None:
        loggers = options.trainer.logger
        for logger in loggers if isinstance(loggers, list) else [loggers]:
            folder = getattr(getattr(logger, "init_args", None), "save_dir", None)
            check_folder("trainer.logger.init_args.save_dir", folder)
        check_folder("trainer.default_root_dir", options.trainer.default_root_dir)
        if self.command == "fit":
            check_folder("checkpoint.dirpath", options.checkpoint.dirpath)
            check_folder("autosave.dirpath", options.autosave.dirpath)

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Write checkpoints atomically, unless `trainer.plugins` names another way."""
        options = self.config_init[self.command].trainer
        if options.enable_progress_bar is False and options.callbacks:  # the bar in base.yaml would contradict it
            options.callbacks = [c for c in options.callbacks if not isinstance(c, ProgressBar)]
        if self.command == "predict" and isinstance(logger := options.logger, TensorBoardLogger):
            options.logger, options.default_root_dir = False, str(Path(logger.save_dir, logger.name))  # it logs nothing
        trainer = super().instantiate_trainer(**kwargs)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = SafeCheckpointIO()
        return trainer

    def before_fit(self) -> None:
        check_keyword(self.trainer, self.config[self.command].ckpt_path)

    before_validate = before_test = before_predict = before_fit

    def after_validate(self) -> None:
        """Print each score once: Lightning's own table repeats them in a column for each dataloader."""
        if self.trainer.is_global_zero:
            print("\n".join(score_lines(self.trainer.callback_metrics)))

    after_test = after_validate


def shipped_configs() -> dict[str, Path]:
    """Name (such as `tiny` or `model/float8`) → file."""
    return {str(f.relative_to(CONFIGS).with_suffix("")): f for f in sorted(CONFIGS.rglob("*.yaml"))}


def configs(parser: LightningArgumentParser, arguments: list[str]) -> None:
    """List the shipped configs, or copy one: configs copy NAME."""
    parser.add_argument("words", nargs="*", type=str, default=[], help="nothing, or: copy NAME")
    words, shipped = parser.parse_args(arguments).words, shipped_configs()
    if not words:
        for name, file in shipped.items():
            print(f"{name:24} {file.read_text(encoding='utf-8').splitlines()[0].lstrip('# ')}")
    elif len(words) != 2 or words[0] != "copy":
        raise UserError(f"got configs {' '.join(words)}, wanted nothing or: configs copy NAME")
    elif Path(new := f"{Path(words[1]).stem}.yaml").exists():
        raise UserError(f"{new} exists here: rename it first")
    else:
        shutil.copyfile(config_path(words[1]), new)
        print(f"wrote {new}: --config {new}")


def config_path(name: str) -> str:
    """The file of a shipped config; a path or YAML is returned unchanged."""
    shipped = shipped_configs()
    if Path(name).is_file():
        return name
    if name in shipped:
        return str(shipped[name])
    if Path(name).exists():
        kind = "folder" if Path(name).is_dir() else "pipe or device"
        raise UserError(f"config {name} is a {kind}, wanted a YAML file: name one")
    if ":" in name or "{" in name:
        return name
    near = guess(name.removesuffix(".yaml"), shipped)
    raise UserError(f"config {name} is neither a file nor shipped: {near}`dream-lightning configs` lists them")


def check_yaml(text: str, name: str, folder: Path | None) -> None:
    """Raise UserError, with the line, for a key that is given twice: YAML would take the last one.

    Args:
        name: the file or option.
        folder: of the file; other YAML files that its values name are checked, too. None: an option, whose text may
            also be something else than YAML.
    """
    try:
        _check_keys(yaml.compose(text, Loader=yaml.CSafeLoader), name, folder)
    except (yaml.YAMLError, RecursionError) as error:
        if folder:
            reason = " ".join(str(error).replace('in "<unicode string>", ', "in ").split())
            raise UserError(f"{name} is no YAML ({reason}): correct it") from error


def _check_keys(node: Any, name: str, folder: Path | None) -> None:
    if isinstance(node, yaml.MappingNode):
        lines: dict[str, int] = {}
        for key, value in node.value:
            word, line = str(key.value), key.start_mark.line + 1
            if word in lines:
                raise UserError(f"{name} has {word} in line {lines[word]} and again in line {line}: delete one")
            lines[word] = line
            _check_keys(value, name, folder)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            _check_keys(value, name, folder)
    elif folder and node is not None and node.value.endswith((".yaml", ".yml")) and (folder / node.value).is_file():
        check_config(folder / node.value)


def check_config(path: Path) -> None:
    """`check_yaml` of a file."""
    with reading(path, "a YAML file"):
        text = path.read_text(encoding="utf-8")
    check_yaml(text, str(path), path.resolve().parent)


def check_words(command: str, words: list[str]) -> None:
    """Exit with a message if an option of `fit` or `evaluate` is wrong; nothing is run."""
    find_configs(words := list(words))
    if command == "evaluate":
        from dream_lightning.evaluation import commands as evaluation

        evaluation.parse_evaluate(_Parser(prog="dream-lightning evaluate"), words)
    else:
        _built(command).parse_args([command, *words])


def sweep(parser: LightningArgumentParser, arguments: list[str]) -> None:
    """Train variants of a config: a list, a grid or a search.

    The search needs Optuna. A sweep that was interrupted resumes.
    """
    from dream_lightning.experiments import commands as experiments

    experiments.sweep(parser, arguments, check_words)


class _Built(Exception):
    """The parser of a command has all its options."""


class _OptionsOnly(_Parser):
    def parse_args(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise _Built(self)


class _DescribedCLI(DreamCLI):
    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> NoReturn:
        raise _Built(parser)


@cache
def _built(command: str) -> _Parser:
    """The parser that a command would parse its words with; the command is not run. Building it takes a second."""
    try:
        if command in TRAINER_COMMANDS:
            _DescribedCLI(command)
        else:
            function_of(command)(_OptionsOnly(prog=f"dream-lightning {command}"), [])
    except _Built as built:
        return built.args[0]


def parser_of(command: str) -> LightningArgumentParser:
    """The parser of a command's options."""
    parser = _built(command)
    return getattr(parser, "of_command", parser)


def completion(parser: LightningArgumentParser, arguments: list[str]) -> None:
    """Print a script that completes commands and options in a shell."""
    parser.add_argument("shell", type=Literal["bash", "zsh", "tcsh"], help="the shell")
    shell = parser.parse_args(arguments).shell
    if find_spec("shtab") is None:
        raise UserError("completion needs shtab: pip install 'dream-lightning[completion]'")
    program = _Parser(prog="dream-lightning", description=__doc__)
    commands = program.add_subcommands(required=False)
    for name, summary in SUMMARIES.items():
        commands.add_subcommand(name, parser_of(name), help=summary)
    print(program.get_completion_script(f"shtab-{shell}"))


def find_configs(words: list[str]) -> None:
    """Replace the names of shipped configs among a command's words by their files, and check the files."""
    for i, word in enumerate(words):
        option, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
        if option == "--config" or (i and words[i - 1] in ("-c", "--config")):
            value = value and config_path(value)
            words[i] = f"{option}{equals}{value}"
        if value.endswith((".yaml", ".yml")) and Path(value).is_file():  # also of a section, as --data=FILE
            check_config(Path(value))


def run(arguments: list[str]) -> None:
    command, *rest = arguments
    check_command(command)
    for word in rest:
        option, _, text = word.partition("=") if word.startswith("--") else ("an option", "", word)
        if "{" in text:
            check_yaml(text, option, None)
    if command in COMMANDS:
        if command in ("sweep", "show", "data-report"):
            find_configs(rest)
        function = function_of(command)
        function(_Parser(prog=f"dream-lightning {command}", description=function.__doc__), rest)
    else:
        if command != "plan":
            if command != "fit":
                warnings.filterwarnings("ignore", ".*callbacks used to create the checkpoint")  # weights only are read
            rest = with_checkpoint(command, rest, gpu=torch.cuda.is_available())
        find_configs(rest)
        sys.argv[1:] = [command, *rest]  # Lightning starts the other processes with it
        DreamCLI(command)


def function_of(command: str) -> Callable[[LightningArgumentParser, list[str]], None]:
    """What runs a command that is no method of the Trainer."""
    return getattr(import_module(f"dream_lightning.{COMMANDS[command][0]}"), command.replace("-", "_"))


@contextmanager
def readable_errors() -> Iterator[None]:
    """Print only the message of an error that users can correct, and exit with status 1; other errors propagate."""
    external = "TORCHELASTIC_RUN_ID" in os.environ or "SLURM_PROCID" in os.environ
    launcher = os.getppid() if external or os.environ.get("LOCAL_RANK", "0") != "0" else os.getpid()
    try:
        yield
    except Exception as error:
        message = for_users(error)
        is_news = _is_news(message or str(error), launcher)
        if os.environ.get(TRACEBACK) == "1" or message is None:
            raise
        if is_news:
            print(f"error: {_shown(message)}\n({TRACEBACK}=1 shows the traceback)", file=sys.stderr)
        raise SystemExit(1) from error


def _is_news(message: str, launcher: int) -> bool:
    """Whether no process of this machine with the same launcher has said so; DIED is news if none has said anything."""
    if "MASTER_PORT" not in os.environ:  # a single process
        return True
    if message == DIED:
        time.sleep(0.5)  # the process with the cause speaks first
    launch = (
        os.getuid() if hasattr(os, "getuid") else "",
        launcher,
        os.environ["MASTER_PORT"],
        os.environ.get("TORCHELASTIC_RESTART_COUNT", 0),
    )
    path = Path(tempfile.gettempdir(), "-".join(map(str, ("dream-lightning", *launch))))
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0), 0o600)
    except OSError:  # rather twice than never
        return True
    with open(descriptor, "a+") as file:
        lock_file(file, wait=True)
        file.seek(0)
        said = file.read().split("\0")[:-1]
        file.write(f"{message}\0")
    return message not in said and not (message == DIED and said)


def for_users(error: BaseException) -> str | None:
    """The message for users in the chain of causes: the parser wraps what classes raise."""
    if isinstance(error, OSError) and disk_refuses(error):
        return f"{error}: make room, or set trainer.logger.init_args.save_dir and data.cache_dir to another disk"
    chain = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    if any(isinstance(e, RuntimeError) and "EADDRINUSE" in str(e) for e in chain):
        port = os.environ.get("MASTER_PORT")
        return f"port {port} is in use by another program: set MASTER_PORT to a free one, or unset it"
    for kind, modules in _TOLD.items():
        for e in chain if kind is UserError else reversed(chain):  # a UserError names the file in which another arose
            if isinstance(e, kind):
                *_, (frame, _) = traceback.walk_tb(e.__traceback__)
                if frame.f_globals["__name__"].startswith(modules):
                    return str(e)
    lost = (torch.distributed.DistBackendError, torch.distributed.DistNetworkError)
    if any(isinstance(e, lost) or (isinstance(e, RuntimeError) and "gloo/transport" in str(e)) for e in chain):
        return DIED
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}: check the path and its permissions"
    return None


# True in general but not here: batches are made in microseconds from memory-mapped ids, and scores are summed over
# processes before they are logged. The last comes from Lightning itself.
_WARNINGS = (
    "does not have many workers",
    "It is recommended to use .self.log.*sync_dist",
    "exists and is not empty",
    "isinstance.treespec, LeafSpec",
)


def tune_gc() -> None:
    """Run the full garbage collector a hundred times less often.

    It takes 0.2 to 0.5 s for the 800,000 long-lived objects of imports and compilation, and the GPU is idle meanwhile.
    """
    gc.freeze()
    young, middle, _ = gc.get_threshold()
    gc.set_threshold(young, middle, 1000)


def main() -> None:
    tune_gc()
    for message in _WARNINGS:
        warnings.filterwarnings("ignore", f".*{message}")
    with readable_errors():
        run(sys.argv[1:])
