"""What adapters belong to: a base of the same contents, and a model that computes with them alike."""

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
    """Content hash of a checkpoint, 64 hexadecimal digits; seconds for 15 GB, because most bytes are not read.

    SHA-256 over every tensor's name, dtype and shape, and over 16 samples of 4 KiB spread evenly over its bytes (all
    bytes of tensors up to 64 KiB). So it does not depend on how the tensors are spread over files. It tells apart
    checkpoints that were trained, merged or cast differently, where changes are everywhere; it is no protection
    against someone who changes single weights on purpose.

    Args:
        files: tensor name → safetensors file.
    """
    headers = {file: _header(file) for file in set(files.values())}
    digest = hashlib.sha256()
    for name in sorted(files):
        entry, data_start = headers[files[name]][0][name], headers[files[name]][1]
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
        saved_hash: `base_hash` of the base under which the adapters were trained.
        loaded_hash: that of the base at hand.
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
    """Refuse a checkpoint with other adapters than the model's, or of another base; looks at no tensor.

    Args:
        checkpoint: of a DreamModule; one with adapters holds `lora`, their LoraParams, and `base`.
        params: the model's adapters, None if all its weights train.
        base: name and hash of the model's base, as `building.adapt` gives them, and `quantize`, how it is held.

    Warns:
        The bases are held differently: nothing is wrong with that, but their rounding differs.

    Raises:
        UserError: with adapters where the model has none, or the other way round, or other ones; the contents of the
            bases differ.
    """
    if (params is None) != ("lora" not in checkpoint):
        raise UserError(
            f"the checkpoint was saved {'with' if 'lora' in checkpoint else 'without'} adapters and model.lora is "
            f"{params}: use the configuration of the run that saved it"
        )
    if params is None:
        return
    saved = checkpoint["base"]
    check_base(saved["hash"], base["hash"], saved_base=saved["name"], loaded_base=base["name"])
    if not params.computes_as(LoraParams(**checkpoint["lora"])):
        raise UserError(f"the checkpoint's adapters are {checkpoint['lora']}, model.lora is {asdict(params)}")
    if saved["quantize"] != base["quantize"]:
        warnings.warn(
            f"the adapters were trained beside a base with model.quantize {saved['quantize']}, now it is "
            f"{base['quantize']}: losses and answers change a little",
            stacklevel=2,
        )


def _header(file: Path) -> tuple[dict, int]:
    """The JSON header of a safetensors file and the place of its first data byte."""
    with open(file, "rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        return json.loads(opened.read(size)), 8 + size
