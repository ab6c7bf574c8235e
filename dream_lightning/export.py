"""Out of Lightning and back to the official folder: what the authors' remote code, and ours, loads.

An official folder holds the weights (safetensors, sharded from 5 GB on), `config.json`, `generation_config.json`, and
the tokenizer twice: `vocab.json`, `merges.txt` and three small files for the authors' slow one, `tokenizer.json` for
everybody else. `config.json` names the authors' Python files in `auto_map`; with `trust_remote_code` transformers wants
them in the same folder, so they are copied from the tokenizer's folder if that has them.
"""

import json
import pickle
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedTokenizerFast

from dream_lightning.model import DreamConfig, DreamModel, load_tokenizer

AUTHORS_CODE = ("configuration_dream.py", "modeling_dream.py", "generation_utils.py", "tokenization_dream.py")
_PREFIX = "model."  # of the network's tensors in a DreamModule's state dict


def export_model(
    model: DreamModel,
    folder: str | Path,
    *,
    tokenizer: PreTrainedTokenizerFast | str | Path | None = None,
    max_shard_size: str = "5GB",
) -> Path:
    """Write the official folder of a model as it is, without changing a bit of it.

    Args:
        model: whole on this process, in one floating-point type, without adapters.
        folder: where to; new or empty. It appears when it is complete, never before.
        tokenizer: a tokenizer, or a folder, hub id or `bytes` to take it from; none is written by default.
        max_shard_size: of one file; the default gives the official four files for the 7B.

    Returns:
        The folder.

    Raises:
        ValueError: the folder is not empty, or the disk too full; the model is sharded, quantised, of mixed types, or
            not a plain Dream.
    """
    _check_plain(model)
    with new_folder(folder, size=sum(t.nbytes for t in model.state_dict().values())) as partial:
        model.save_pretrained(partial, max_shard_size=max_shard_size)
        if tokenizer is not None:
            save_tokenizer(tokenizer, partial)
    return Path(folder)


def export_checkpoint(
    ckpt_path: str | Path,
    folder: str | Path,
    *,
    pretrained: str | Path | None = None,
    tokenizer: PreTrainedTokenizerFast | str | Path | None = None,
    dtype: Literal["keep", "bfloat16"] = "keep",
    max_shard_size: str = "5GB",
) -> Path:
    """Write the official folder of the weights in a Lightning checkpoint of `DreamModule`.

    Args:
        ckpt_path: what `trainer.save_checkpoint` wrote. It is mapped, not read: optimiser states cost no memory.
        folder: as in `export_model`.
        pretrained: the folder or hub id that training started from; gives what the checkpoint does not hold.
        tokenizer: as in `export_model`; by default that of `pretrained`.
        dtype: element type to write: as stored, or rounded to bfloat16 like the official weights.
        max_shard_size: as in `export_model`.

    Raises:
        ValueError: as `export_model` and `model_from_checkpoint`.
    """
    _check_target(Path(folder))
    model = model_from_checkpoint(ckpt_path, pretrained=pretrained)
    if dtype != "keep":
        model.to(getattr(torch, dtype))
    return export_model(model, folder, tokenizer=tokenizer or pretrained, max_shard_size=max_shard_size)


def model_from_checkpoint(ckpt_path: str | Path, *, pretrained: str | Path | None = None) -> DreamModel:
    """The network of a Lightning checkpoint, on the CPU, its weights mapped from the file.

    Its sizes stand in the checkpoint (`dream_config`) or, if not, in the config.json of `pretrained`.

    Raises:
        ValueError: no such file, not a whole checkpoint, or one that holds more than tensors and plain values; a
            sharded checkpoint; adapters; no sizes; tensors that do not fit the sizes.
    """
    checkpoint = _read_checkpoint(Path(ckpt_path))
    state = {k.removeprefix(_PREFIX): v for k, v in checkpoint["state_dict"].items() if k.startswith(_PREFIX)}
    if any("lora_" in name for name in state):
        # The place of the adapters' branch: load `pretrained` in bfloat16 (never in 4 bits), merge, return the model.
        raise ValueError(f"{ckpt_path} holds adapters: merge them into the model and pass that to export_model")
    config = _config(checkpoint, ckpt_path, pretrained)
    with torch.device("meta"):
        model = DreamModel(config)
    try:
        model.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise ValueError(
            f"{ckpt_path} does not hold the Dream that {pretrained or 'its dream_config'} describes; name the model "
            f"that training started from. {str(error)[:1000]}"
        ) from error
    return model


def save_tokenizer(tokenizer: PreTrainedTokenizerFast | str | Path, folder: str | Path) -> None:
    """Write a tokenizer as the authors' slow class reads it, and `tokenizer.json` for the fast ones.

    Args:
        tokenizer: a fast tokenizer, or a folder, hub id or `bytes`. Out of a folder the authors' code is copied too.
        folder: an existing folder.

    Raises:
        ValueError: no tokenizer there.
    """
    fast = tokenizer if isinstance(tokenizer, PreTrainedTokenizerFast) else load_tokenizer(tokenizer)
    folder = Path(folder)
    fast.backend_tokenizer.save(str(folder / "tokenizer.json"))
    fast.backend_tokenizer.model.save(str(folder))  # vocab.json, merges.txt
    flags = ("lstrip", "normalized", "rstrip", "single_word")
    added = {
        i: {n: getattr(t, n) for n in ("content", *flags, "special")} for i, t in fast.added_tokens_decoder.items()
    }
    special = {f"{n}_token": getattr(fast, f"{n}_token") for n in ("bos", "eos", "mask", "pad")}
    settings = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": {str(i): token for i, token in added.items()},
        "additional_special_tokens": [special["bos_token"], special["mask_token"]],
        "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]},
        **special,
        "chat_template": fast.chat_template,
        "clean_up_tokenization_spaces": False,
        "errors": "replace",
        "model_max_length": fast.model_max_length,
        "split_special_tokens": False,
        "tokenizer_class": "DreamTokenizer",
        "unk_token": None,
    }
    _write_json(folder / "tokenizer_config.json", settings)
    _write_json(folder / "added_tokens.json", {token["content"]: i for i, token in added.items()})
    special_map = {name: {"content": content, **dict.fromkeys(flags, False)} for name, content in special.items()}
    extra = {"additional_special_tokens": settings["additional_special_tokens"]}
    _write_json(folder / "special_tokens_map.json", extra | special_map)
    if isinstance(tokenizer, str | Path):
        for file in (Path(tokenizer, name) for name in AUTHORS_CODE):
            if file.is_file():
                shutil.copyfile(file, folder / file.name)


@contextmanager
def new_folder(folder: str | Path, *, size: int) -> Iterator[Path]:
    """A hidden folder beside `folder` to write into, which takes its name at the end, and is deleted on an error.

    Args:
        folder: new or empty.
        size: bytes that will be written.

    Raises:
        ValueError: the folder is not empty, or the disk has less room than `size`.
    """
    folder = Path(folder).expanduser().resolve()
    _check_target(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(folder.parent).free) < size:
        raise ValueError(f"{folder} needs {size / 1e9:.1f} GB, the disk has {free / 1e9:.1f} GB left: free some")
    partial = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.partial")
    partial.mkdir()
    try:
        yield partial
        if folder.exists():
            folder.rmdir()
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _check_target(folder: Path) -> None:
    folder = folder.expanduser()
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not an empty folder: name a new one, or remove it first")


def _check_plain(model: DreamModel) -> None:
    state = model.state_dict()
    with torch.device("meta"):
        expected = DreamModel(model.config).state_dict().keys() if isinstance(model, DreamModel) else set()
    if odd := sorted(expected ^ state.keys()):
        raise ValueError(
            f"a {type(model).__name__} with {len(odd)} missing or unexpected tensors ({', '.join(odd[:3])}, …) is not "
            "a plain DreamModel: merge adapters into the bfloat16 base first (PEFT: merge_and_unload)"
        )
    if any(isinstance(tensor, DTensor) for tensor in state.values()):
        raise ValueError("the model is sharded over ranks: save a checkpoint and use export_checkpoint")
    if any(tensor.is_meta for tensor in state.values()):
        raise ValueError("the model has no weights (meta device): load or train it first")
    types = {tensor.dtype for tensor in state.values()}
    if len(types) > 1 or not next(iter(types)).is_floating_point:
        raise ValueError(
            f"the model holds {', '.join(sorted(map(str, types)))}: wanted one floating-point type. Convert it with "
            "model.to(torch.bfloat16); from a 4-bit model export the bfloat16 base that it was made from"
        )


def _read_checkpoint(path: Path) -> dict[str, Any]:
    if path.is_dir():
        raise ValueError(
            f"{path} is a sharded checkpoint: make one file of it with "
            f"`python -m lightning.pytorch.utilities.consolidate_checkpoint {path}` and export {path}.consolidated"
        )
    if not path.is_file():
        raise ValueError(f"there is no checkpoint {path}: wanted a file that trainer.save_checkpoint wrote")
    try:
        checkpoint: dict[str, dict[str, Tensor]] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise ValueError(f"{path} is not a whole checkpoint of DreamModule: {str(error)[:500]}") from error
    if "state_dict" not in checkpoint:
        raise ValueError(f"{path} has no state_dict: wanted a file that trainer.save_checkpoint wrote")
    return checkpoint


def _config(checkpoint: dict[str, Any], path: str | Path, pretrained: str | Path | None) -> DreamConfig:
    if "dream_config" in checkpoint:
        return DreamConfig.from_dict(checkpoint["dream_config"])
    if pretrained is None:
        raise ValueError(
            f"{path} does not say its model's sizes: name the model that training started from (pretrained)"
        )
    try:
        return DreamConfig.from_pretrained(pretrained)
    except OSError as error:
        raise ValueError(f"no config.json at {str(pretrained)!r}: {str(error)[:300]}") from error


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
