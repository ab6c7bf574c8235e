"""From Lightning checkpoints to the official folder, which the authors' remote code and this package load.

It holds sharded safetensors, `config.json`, `generation_config.json` and the tokenizer, for the authors' slow class and
for fast ones. With `trust_remote_code` transformers expects the authors' code in the same folder: see `AUTHORS_CODE`.
"""

import json
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from torch.distributed.tensor import DTensor
from transformers import PreTrainedTokenizerFast

from dream_lightning.adapters import (
    adapter_state,
    add_trained_lora,
    base_hash,
    check_base,
    is_peft_folder,
    merge_lora,
    model_names,
    read_peft_folder,
    read_peft_weights,
    save_peft_folder,
)
from dream_lightning.atomic import atomic_write
from dream_lightning.errors import UserError, reading
from dream_lightning.locate import TRAINED, Trained, find_model, trained
from dream_lightning.model import DreamConfig, DreamModel, check_same_vocabulary, check_tokenizer, load_tokenizer
from dream_lightning.model.loading import check_finite, local_folder, weight_files
from dream_lightning.training.checkpointing import reading_checkpoint, refuse_weights
from dream_lightning.training.sharded_checkpoint import read_sharded

AUTHORS_CODE = ("configuration_dream.py", "modeling_dream.py", "generation_utils.py", "tokenization_dream.py")


def export_model(
    model: DreamModel,
    folder: str | Path,
    *,
    tokenizer: PreTrainedTokenizerFast | str | Path | None = None,
    max_shard_size: str = "5GB",
    how: Trained | None = None,
) -> Path:
    """Write the official folder of a model, bit for bit.

    Args:
        model: unsharded, in one floating-point type, without adapters.
        folder: new or empty; written atomically.
        tokenizer: a tokenizer, or a folder, hub id or `bytes` to take it from. Default: none is written.
        max_shard_size: of one file; the default gives the official four files for the 7B.
        how: sampling and prompts of the training, which `chat`, `serve` and `evaluate` then take as their defaults.
    """
    _check_plain(model)
    if not re.fullmatch(r"[1-9]\d{0,8}[KMGT]B", max_shard_size):
        raise UserError(f"max_shard_size is {max_shard_size}, wanted a size such as 5GB or 500MB")
    if tokenizer is not None:
        fast = tokenizer if isinstance(tokenizer, PreTrainedTokenizerFast) else load_tokenizer(tokenizer)
        check_tokenizer(fast, model.config)
    with new_folder(folder, size=sum(t.nbytes for t in model.state_dict().values())) as partial:
        model.save_pretrained(partial, max_shard_size=max_shard_size)
        if tokenizer is not None:
            save_tokenizer(tokenizer, partial)
        if how is not None and how != Trained({}):
            _write_json(partial / TRAINED, {n: x for n, x in asdict(how).items() if n != "tokenizer"})
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

    Args as in `export_model`, and:
        ckpt_path: a file, which is memory-mapped, the folder of a sharded checkpoint, or what else `find_model` knows.
        pretrained: the model that training started from; by default as the checkpoint says.
        tokenizer: by default that of `pretrained`, otherwise of the training; a warning says if none is known.
        dtype: element type to write: as stored, or rounded to bfloat16 like the official weights.

    Raises:
        UserError: `tokenizer` has another vocabulary than that of the training; as `export_model`.
    """
    model, source = model_from_checkpoint(ckpt_path, pretrained=pretrained)
    if dtype != "keep":
        model.to(getattr(torch, dtype))
    if tokenizer is not None and source is not None:
        check_same_vocabulary(tokenizer, source)
    if (tokenizer := tokenizer or source) is None:
        warnings.warn(
            f"{ckpt_path} does not say what its tokenizer is: none is written; name it in tokenizer or pretrained",
            stacklevel=2,
        )
    return export_model(model, folder, tokenizer=tokenizer, max_shard_size=max_shard_size, how=trained(ckpt_path))


def export_adapter(ckpt_path: str | Path, folder: str | Path, *, pretrained: str | Path | None = None) -> Path:
    """Write the adapters in a Lightning checkpoint of `DreamModule` as a PEFT folder; the base is not read.

    `PeftModel.from_pretrained(base, folder)` puts them on the official base, in the authors' code or in ours.

    Args as in `export_checkpoint`, and:
        pretrained: name of the base for `adapter_config.json`, such as its hub id. Default: that of the training run.
    """
    checkpoint = _read_checkpoint(find_model(ckpt_path).path)
    if "lora" not in checkpoint:
        raise UserError(f"{ckpt_path} holds no adapters: export the official folder")
    state = adapter_state(_state(checkpoint))
    base = checkpoint["base"] | ({"name": str(pretrained)} if pretrained else {})
    with new_folder(folder, size=sum(tensor.nbytes for tensor in state.values())) as partial:
        save_peft_folder(partial, state, checkpoint["lora"], base)
    return Path(folder)


def model_from_checkpoint(
    ckpt_path: str | Path, *, pretrained: str | Path | None = None
) -> tuple[DreamModel, str | Path | None]:
    """The network that `find_model` finds, on the CPU, with adapters merged; and its tokenizer.

    The tokenizer is a folder, a hub id or `bytes`: `pretrained`, or what training used; None if it is not known.

    Raises:
        UserError: not a complete checkpoint; more than tensors and plain values; another base.
    """
    found = find_model(ckpt_path)
    if found.kind in ("model", "hub"):
        return DreamModel.from_pretrained(found.name), pretrained or found.name
    ckpt_path = found.path
    checkpoint = _read_checkpoint(ckpt_path)
    base = pretrained or checkpoint.get("base", {}).get("name")
    if "lora" in checkpoint and base is None:
        raise UserError(f"{ckpt_path} does not name the base of its adapters: set pretrained to it")
    with reading(ckpt_path, "a checkpoint of a DreamModule", "use an earlier one"):
        model = _merged(checkpoint, base) if "lora" in checkpoint else _whole(checkpoint)
    return model, pretrained or checkpoint.get("tokenizer") or base


def base_of(path: str | Path) -> str | None:
    """The folder or hub id of what a checkpoint or a folder of adapters was trained from; None if it does not say."""
    found = find_model(path)
    if found.kind in ("model", "hub"):
        return None
    checkpoint = _read_checkpoint(found.path)
    return checkpoint.get("base", {}).get("name") or checkpoint.get("settings", {}).get("model.pretrained")


def _whole(checkpoint: dict[str, Any]) -> DreamModel:
    with torch.device("meta"):
        model = DreamModel(DreamConfig.from_dict(checkpoint["dream_config"]))
    model.load_state_dict(_state(checkpoint), assign=True)
    return model


def _state(checkpoint: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {n.removeprefix("model."): t for n, t in checkpoint["state_dict"].items() if n.startswith("model.")}


def save_tokenizer(tokenizer: PreTrainedTokenizerFast | str | Path, folder: str | Path) -> None:
    """Write a tokenizer for fast and slow classes, with the authors' code if its own folder has it.

    Without that code, `AutoTokenizer` loads the fast class: llama.cpp's converter and other programs ask it.
    """
    fast = tokenizer if isinstance(tokenizer, PreTrainedTokenizerFast) else load_tokenizer(tokenizer)
    folder = Path(folder)
    fast.backend_tokenizer.save(str(folder / "tokenizer.json"))
    fast.backend_tokenizer.model.save(str(folder))  # vocab.json, merges.txt
    flags = ("lstrip", "normalized", "rstrip", "single_word")
    fields = ("content", *flags, "special")
    added = {i: {name: getattr(token, name) for name in fields} for i, token in fast.added_tokens_decoder.items()}
    code = [Path(tokenizer, name) for name in AUTHORS_CODE] if isinstance(tokenizer, str | Path) else []
    code = [file for file in code if file.is_file()]
    named = {name: getattr(fast, name) for name in ("bos_token", "eos_token", "mask_token", "pad_token")}
    named = {name: content for name, content in named.items() if content is not None}
    additional = {"additional_special_tokens": [named[n] for n in ("bos_token", "mask_token") if n in named]}
    settings = {  # tests compare them with the official file
        **dict.fromkeys(("add_bos_token", "add_prefix_space", "split_special_tokens"), False),
        "clean_up_tokenization_spaces": False,
        "added_tokens_decoder": {str(i): token for i, token in added.items()},
        "chat_template": fast.chat_template,
        "errors": "replace",
        "model_max_length": fast.model_max_length,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": None,
    }
    if "tokenization_dream.py" in (file.name for file in code):
        settings["tokenizer_class"] = "DreamTokenizer"
        settings["auto_map"] = {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]}
    _write_json(folder / "tokenizer_config.json", settings | named | additional)
    _write_json(folder / "added_tokens.json", {token["content"]: i for i, token in added.items()})
    plain = {name: {"content": content, **dict.fromkeys(flags, False)} for name, content in named.items()}
    _write_json(folder / "special_tokens_map.json", plain | additional)
    for file in code:
        shutil.copyfile(file, folder / file.name)


@contextmanager
def new_folder(folder: str | Path, *, size: int) -> Iterator[Path]:
    """`atomic_write` of a new or empty folder with `size` bytes.

    Raises:
        UserError: `folder` is neither new nor empty; the disk is full.
    """
    folder = Path(folder).expanduser().resolve()
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not an empty folder: name a new one")
    with atomic_write(folder, needed_bytes=size) as partial:
        partial.mkdir()
        yield partial
        for file in partial.iterdir():
            file.chmod(partial.stat().st_mode & 0o666)  # safetensors writes files that others may not read


def _check_plain(model: DreamModel) -> None:
    with torch.device("meta"):
        expected = DreamModel(model.config).state_dict().keys()
    state = model.state_dict()
    if odd := sorted(expected ^ state.keys()):
        raise UserError(
            f"the model has {len(odd)} tensors too many or too few ({', '.join(odd[:3])}, …): merge adapters first"
        )
    if any(isinstance(tensor, DTensor) or tensor.is_meta for tensor in state.values()):
        raise UserError("the model is sharded or on the meta device: export a checkpoint of it")
    types = {tensor.dtype for tensor in state.values()}
    if len(types) > 1 or not next(iter(types)).is_floating_point:
        raise UserError(f"the model holds {types}, wanted one floating-point type: call model.to(torch.bfloat16)")
    for name, tensor in state.items():
        check_finite(name, tensor, "the model")


def _read_checkpoint(path: Path) -> dict[str, Any]:
    """What a Lightning checkpoint holds, and a PEFT folder as one."""
    if is_peft_folder(path):
        adapters = read_peft_folder(path if path.is_dir() else path.parent)
        state = {f"model.{name}": tensor for name, tensor in model_names(read_peft_weights(adapters)).items()}
        return {"state_dict": state, "lora": adapters.config, "base": adapters.base}
    refuse_weights(path)
    if path.is_dir():
        return read_sharded(path)
    with reading_checkpoint(path):
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        checkpoint["state_dict"].keys(), checkpoint["dream_config"]
    return checkpoint


def _merged(checkpoint: dict[str, Any], pretrained: str | Path) -> DreamModel:
    """The unquantized base with the adapters merged into its weights."""
    folder = local_folder(pretrained)
    check_base(checkpoint["base"], {"name": pretrained, "hash": base_hash(weight_files(folder))})
    model = DreamModel.from_pretrained(folder)
    add_trained_lora(model, checkpoint["lora"], adapter_state(_state(checkpoint)))
    merge_lora(model)
    return model


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
