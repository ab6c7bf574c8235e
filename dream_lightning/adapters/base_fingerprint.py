"""Which base adapters were trained on: a content hash of its files, and the check when adapters are loaded."""

import hashlib
import json
from pathlib import Path

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


def check_base(saved: dict[str, str], loaded: dict[str, str]) -> None:
    """Raise UserError if adapters were trained on another base; of both `name` (folder or hub id) and `hash`.

    Foreign adapters have no hash: nothing is compared.
    """
    if saved.get("hash", loaded["hash"]) != loaded["hash"]:
        raise UserError(
            f"these adapters belong to {saved['name']} (hash {saved['hash'][:12]}), but {loaded['name']} has other "
            f"weights (hash {loaded['hash'][:12]}): load the base that they were trained on"
        )


def _header(file: Path) -> tuple[dict, int]:
    """The JSON header of a safetensors file and the offset of its first data byte."""
    with open(file, "rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        return json.loads(opened.read(size)), 8 + size
