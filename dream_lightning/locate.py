"""What a name on the command line means: a run, a checkpoint, adapters, a model folder, or a hub id."""

import json
from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import yaml

from dream_lightning.adapters import is_peft_folder
from dream_lightning.adapters.peft_folder import read_peft_folder
from dream_lightning.errors import UserError, reading
from dream_lightning.model.loading import local_folder
from dream_lightning.training.sharded_checkpoint import read_rest

_KEYWORDS = ("last", "best", "hpc", "registry")  # of Lightning's ckpt_path
TRAINED = "dream_lightning.json"  # in an exported folder: the fields of `Trained`


@dataclass(frozen=True)
class Found:
    """A model by its kind; only a `hub` id, which may end in `@revision`, has no path."""

    kind: Literal["checkpoint", "adapters", "model", "hub"]
    name: str

    @property
    def path(self) -> Path:
        return Path(self.name)


def find_model(name: str | Path) -> Found:
    """The folder of a run, of its logger (`version_0`) or of its checkpoints is its `last.ckpt` or only checkpoint.

    Raises:
        UserError: nothing there; more than one thing, which are named.
    """
    path = Path(name).expanduser()
    if not path.exists():
        if path.suffix == ".ckpt" or str(name).startswith(("/", "~", ".")):
            raise UserError(f"{path} does not exist: name a run, a checkpoint, a model folder or a hub id")
        return Found("hub", str(name))
    if is_peft_folder(path) and path.is_file():
        return Found("adapters", str(path.parent))
    if not path.is_dir() or path.suffix == ".ckpt" or (path / "meta.pt").is_file():  # a folder is a sharded one
        return Found("checkpoint", str(path))
    saved = checkpoints_of(path)
    saved = [file for file in saved if file.name == "last.ckpt"] or saved
    found = [Found("model", str(path))] * (path / "config.json").is_file()
    found += [Found("adapters", str(path))] * is_peft_folder(path)
    found += [Found("checkpoint", str(file)) for file in saved]
    if len(found) == 1:
        return found[0]
    if not found:
        raise UserError(f"{path} holds no checkpoint, no adapters and no model (config.json): name another folder")
    what = ", ".join(f"{f.kind} {f.name}" if f.kind == "checkpoint" else f"a {f.kind} folder" for f in found)
    raise UserError(f"{path} is ambiguous ({what}): name one of them")


def checkpoints_of(folder: Path) -> list[Path]:
    """The checkpoints of a run: in its folder, in `checkpoints`, or, for a logger's version, those that name it."""
    for place in (folder, folder / "checkpoints"):
        if found := sorted(place.glob("*.ckpt")):
            return found
    near = sorted((folder.parent / "checkpoints").rglob("*.ckpt")) if folder.name.startswith("version_") else []
    return [file for file in near if Path(read_rest_of(file).get("run") or "").name == folder.name]


def read_rest_of(path: Path) -> dict[str, Any]:
    """A checkpoint, whose tensors are not read."""
    if path.is_dir():
        return read_rest(path)
    with reading(path, "a checkpoint", "use an earlier one"):
        return dict(torch.load(path, map_location="cpu", weights_only=True, mmap=True))


@dataclass(frozen=True)
class Trained:
    """How a model was trained, as far as its checkpoint or folder says it: what its use depends on."""

    sampling: dict[str, Any]  # fields of SamplingParams
    style: str = "chat"
    system_prompt: str | None = None
    tokenizer: str | None = None
    several_turns: bool | None = None  # whether some training example had earlier messages; None: not known

    @property
    def history(self) -> bool:
        """Whether to give the model earlier messages."""
        return self.several_turns is not False and self.style == "chat"


def trained(name: str | Path) -> Trained:
    """Of a checkpoint or what was exported from one, here or on the hub; other models do not say it.

    Raises:
        UserError: as `find_model` and `local_folder`; the file is damaged.
    """
    found = find_model(name)
    if found.kind in ("model", "hub") and (file := local_folder(found.name, files=[TRAINED]) / TRAINED).is_file():
        with reading(file, "a JSON object with the fields of Trained", "export the folder again, or remove the file"):
            return Trained(**json.loads(file.read_text(encoding="utf-8")))
    if found.kind != "checkpoint":
        return Trained({})
    rest = read_rest_of(found.path)
    settings = rest.get("settings", {})
    known = {option: settings.get(f"data.{option}") for option in ("system_prompt", "several_turns")}
    sampling = rest.get("hyper_parameters", {}).get("sampling") or {}
    return Trained(sampling, settings.get("data.style") or "chat", tokenizer=rest.get("tokenizer"), **known)


def with_checkpoint(command: str, words: list[str], gpu: bool) -> list[str]:
    """The words of `validate`, `test`, `predict` and `fit` with `--ckpt_path` found, see `find_model`.

    Without a config, the options of the run that saved the checkpoint are used, and those given override them.
    A model or adapters without a run become `--model.pretrained` and `--model.lora.adapter`.
    """
    i = next((i for i, word in enumerate(words) if word.partition("=")[0] == "--ckpt_path"), None)
    given = None if i is None else words[i].partition("=")[2] or "".join(words[i + 1 : i + 2])
    if i is None or not given or given in _KEYWORDS:
        return words
    found, rest = find_model(given), words[:i] + words[i + (1 if "=" in words[i] else 2) :]
    if found.kind == "checkpoint":
        config = [] if command == "fit" or _has_config(words) else ["--config", _config_of(found.path)]
        return [*config, *rest, f"--ckpt_path={found.name}"]
    if command == "fit":
        return words
    options = {"new_model": "null", "pretrained": found.name, "tokenizer": "null"}
    if found.kind == "adapters":
        options |= {"pretrained": read_peft_folder(found.name).base["name"], "lora.adapter": found.name}
    defaults = {}
    if not _has_config(words):
        how = trained(given)
        questions = ArgumentParser(add_help=False, allow_abbrev=False)
        questions.add_argument("--data.predict_source", dest="source")
        defaults = {"model.dtype": "bfloat16" if gpu else "float32", "data.style": how.style}
        sampling = {"forbid_mask": True} | how.sampling
        defaults |= {f"model.sampling.{name}": value for name, value in sampling.items()}
        defaults["data.system_prompt"] = how.system_prompt
        if source := questions.parse_known_args(rest)[0].source:
            defaults["data.source"] = source
    return [
        *(f"--{name}={v if isinstance(v, str) else json.dumps(v)}" for name, v in defaults.items()),
        *rest,
        *(f"--model.{name}={value}" for name, value in options.items()),
    ]


def _has_config(words: Sequence[str]) -> bool:
    return any(word.partition("=")[0] in ("-c", "--config") for word in words)


def _config_of(path: Path) -> str:
    """The options of the run that saved a checkpoint, as YAML; its logger is off, and answers go next to the run."""
    rest = read_rest_of(path)
    model, data = rest.get("hyper_parameters"), rest.get("datamodule_hyper_parameters")
    if not model or not data:
        raise UserError(f"{path} does not hold the options of its run: add --config")
    folder = path.parent.parent if path.parent.name == "checkpoints" else path.parent
    trainer = {"logger": False, "default_root_dir": str(folder), "precision": rest["settings"].get("trainer.precision")}
    savers = {name: {"dirpath": str(path.parent)} for name in ("checkpoint", "autosave")}
    return yaml.safe_dump({"model": model, "data": data, "trainer": trainer, **savers})
