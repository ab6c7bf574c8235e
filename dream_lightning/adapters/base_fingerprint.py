"""Which base adapters were trained on: a content hash, and the checks when a checkpoint is loaded."""

import hashlib
import json
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dream_lightning.adapters.lora import LoraParams
from dream_lightning.errors import UserError

_BLOCK, _SAMPLES = 4096, 16  # bytes of one sample and samples of one tensor, in `base_hash`


def base_hash(files: dict[str, Path]) -> str:
    """Content hash of a checkpoint, 64 hexadecimal digits; takes seconds for 15 GB, as most bytes are not read.

    SHA-256 over every tensor's name, dtype and shape, and over 16 samples of 4 KiB spread evenly over its bytes (all
    bytes of tensors up to 64 KiB), so it does not depend on the sharding into files. It distinguishes checkpoints that
    were trained, merged or cast differently, where changes are everywhere; it does not protect against someone who
    changes single weights on purpose.

    Args:
        files: tensor name → safetensors file.
    """
    headers = {file: _header(file) for file in set(files.values())}
    digest = hashlib.sha256()
    for name in sorted(files):
        header, data_start = headers[files[name]]
        entry = header[name]
        digest.update(json.dumps([name, entry["dtype"], entry["shape"]]).encode())
        start, end = (data_start + offset for offset in entry["data_offsets"])
        with open(files[name], "rb", buffering=0) as file:
            if end - start <= _BLOCK * _SAMPLES:
                file.seek(start)
                digest.update(file.read(end - start))
                continue
            for sample in range(_SAMPLES):
                file.seek(start + (end - start - _BLOCK) * sample // (_SAMPLES - 1))
                digest.update(file.read(_BLOCK))
    return digest.hexdigest()


def check_base(saved_hash: str, loaded_hash: str, *, saved_base: str, loaded_base: str) -> None:
    """Refuse adapters that were trained on another base.

    Args:
        saved_hash: `base_hash` of the base of the adapters.
        loaded_hash: `base_hash` of the loaded base.
        saved_base, loaded_base: their folders or hub ids, for the message.

    Raises:
        UserError: the hashes differ.
    """
    if saved_hash != loaded_hash:
        raise UserError(
            f"these adapters belong to {saved_base} (hash {saved_hash[:12]}), but the base loaded from {loaded_base} "
            f"has other weights (hash {loaded_hash[:12]}): load the base that they were trained on"
        )


def check_adapters(checkpoint: dict[str, Any], params: LoraParams | None, base: dict[str, str] | None) -> None:
    """Refuse a checkpoint whose adapters or base are not the model's; reads no tensor.

    Args:
        checkpoint: of a DreamModule; one with adapters holds `lora`, their LoraParams, and `base`.
        params: the model's adapters; None if all weights train.
        base: `name`, content `hash` and `quantize` of the model's base.

    Warns:
        The base is quantized differently, so its rounding differs.

    Raises:
        UserError: only one of the two has adapters, the adapters differ, or the contents of the bases differ.
    """
    saved = checkpoint.get("lora")
    if (params is None) != (saved is None):
        raise UserError(
            f"the checkpoint was saved {'without' if saved is None else 'with'} adapters and model.lora is {params}: "
            "use the configuration of the run that saved it"
        )
    if params is None:
        return
    saved_base = checkpoint["base"]
    check_base(saved_base["hash"], base["hash"], saved_base=saved_base["name"], loaded_base=base["name"])
    if len({(p.rank, p.alpha, *p.target_names) for p in (params, LoraParams(**saved))}) > 1:
        raise UserError(f"the checkpoint's adapters are {saved}, model.lora is {asdict(params)}")
    if saved_base["quantize"] != base["quantize"]:
        warnings.warn(
            f"the adapters were trained on a base with model.quantize {saved_base['quantize']}, now it is "
            f"{base['quantize']}: losses and answers change a little",
            stacklevel=2,
        )


def _header(file: Path) -> tuple[dict, int]:
    """The JSON header of a safetensors file and the offset of its first data byte."""
    with open(file, "rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        return json.loads(opened.read(size)), 8 + size
