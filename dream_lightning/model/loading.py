"""Find a checkpoint and check that it is complete, before anything large is read."""

import json
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled
from safetensors import SafetensorError, safe_open

from dream_lightning.errors import UserError

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
CHECKPOINT = ("*.json", "*.safetensors", "merges.txt")  # configuration, tokenizer and weights, never code


def local_folder(path_or_hub_id: str | Path, *, files: Sequence[str] = CHECKPOINT, revision: str | None = None) -> Path:
    """The folder of a local checkpoint, or of a downloaded hub checkpoint.

    `HF_ENDPOINT`, `HF_HUB_OFFLINE` and the hub's cache work as in huggingface_hub; `files` are patterns to download.
    Raises UserError if it is neither a folder nor a reachable hub id, or has no config.json and `files` includes it.
    """
    path = Path(path_or_hub_id).expanduser()
    if path.is_file():
        raise UserError(f"{path} is a file: name the folder that holds it")
    if not path.is_dir():
        try:
            path = Path(snapshot_download(str(path_or_hub_id), revision=revision, allow_patterns=list(files)))
        except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
            unnamed = isinstance(error, HFValidationError)  # a path, not an id
            why = "no such folder" if unnamed else f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
            raise UserError(
                f"{str(path_or_hub_id)!r} is neither a folder here nor a hub id that can be fetched ({why}). Check the "
                "spelling; without network name a local folder, with a mirror set HF_ENDPOINT"
            ) from error
    if any(fnmatch("config.json", pattern) for pattern in files) and not (path / "config.json").is_file():
        raise UserError(
            f"{path} has no config.json, wanted the official Dream format: config.json and {SINGLE}, or {INDEX} with "
            "its shards"
        )
    return path


def weight_files(folder: Path) -> dict[str, Path]:
    """Tensor name → its file, from the index or the single file; UserError if a file is missing."""
    if (folder / INDEX).is_file():
        weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
        missing = sorted({file for file in weight_map.values() if not (folder / file).is_file()})
        if missing:
            raise UserError(
                f"{folder} lacks {len(missing)} of its {len(set(weight_map.values()))} shards: {', '.join(missing)}. "
                "Copy or download them again"
            )
        return {name: folder / file for name, file in weight_map.items()}
    if (folder / SINGLE).is_file():
        with _open(folder / SINGLE) as tensors:
            return dict.fromkeys(tensors.keys(), folder / SINGLE)
    raise UserError(f"{folder} holds no weights: wanted {SINGLE}, or {INDEX} with its shards")


def check_weights(folder: Path, expected: dict[str, tuple[int, ...]]) -> None:
    """Compare names and shapes in the files' headers with the model's; UserError if they differ."""
    files = weight_files(folder)
    found: dict[str, tuple[int, ...]] = {}
    for file in sorted(set(files.values())):
        with _open(file) as tensors:
            found |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    reshaped = [n for n in expected.keys() & found.keys() if expected[n] != found[n]]
    kinds = {
        "are missing": expected.keys() - found.keys(),
        "are unexpected": found.keys() - expected.keys(),
        "have another shape": [f"{n} is {list(found[n])}, wanted {list(expected[n])}" for n in reshaped],
    }
    problems = [f"{len(items)} tensors {kind}: {_few(sorted(items))}" for kind, items in kinds.items() if items]
    if problems:
        raise UserError(f"{folder} does not hold the model of its config.json: {'; '.join(problems)}")


def _open(file: Path):
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise UserError(f"{file} is not a whole safetensors file ({error}): copy or download it again") from error


def _few(items: list[str]) -> str:
    return ", ".join(items[:4]) + (f" and {len(items) - 4} more" if len(items) > 4 else "")
