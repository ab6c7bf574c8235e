"""Random bad files and options: each works, or ends in one message that names the file or option."""

import csv
import json
import math
import random
import shutil
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from material import addition_rows, quiet_trainer, save_tiny_folder, tiny_module, write_jsonl

from dream_lightning import DreamModel, S1KDataModule, SamplingParams, load_tokenizer
from dream_lightning.adapters import LoraParams
from dream_lightning.cli import check_config, for_users, shipped_configs
from dream_lightning.data import read_examples
from dream_lightning.export import model_from_checkpoint
from dream_lightning.predict import PredictionFile
from dream_lightning.training.checkpointing import SafeCheckpointIO

HUGE = 10**400
VALUES = [None, True, -1, 0, 1, 2.5, -0.5, math.nan, math.inf, 2**63, HUGE, "x", "", "\x1b[2J", [], ["a"], {}, {"a": 1}]


def outcome(act, names: list[str]) -> object:
    """What `act` returns; None after an error for users. Other errors, and messages that name nothing, fail."""
    try:
        return act()
    except Exception as error:
        message = for_users(error)
        if message is None:
            raise
        assert any(name in message for name in names), f"{names} not in: {message}"
        return None


def broken_bytes(rng: random.Random, content: bytes) -> bytes:
    """Truncated, flipped, overwritten, repeated or encoded otherwise."""
    middle = rng.randrange(len(content))
    flipped = bytes([content[middle] ^ 1 << rng.randrange(8)])
    return rng.choice(
        [
            lambda: content[:middle],
            lambda: content[:middle] + flipped + content[middle + 1 :],
            lambda: content[:middle] + rng.randbytes(min(40, len(content) - middle)) + content[middle + 40 :],
            lambda: content + content,
            lambda: content[:middle] + content[middle // 2 :],
            lambda: rng.randbytes(200),
            lambda: b"",
            lambda: content.decode("latin-1").encode("utf-16"),
            lambda: b"[" * 100_000,
            lambda: b"\0" * len(content),
            lambda: b'{"a": 1e999, "b": ' + b"9" * 5000 + b"}\n",
        ]
    )()


def broken_json(rng: random.Random, content: bytes) -> bytes:
    """Another value, key or type somewhere, or the same key twice; or as `broken_bytes`."""
    if rng.random() < 0.4:
        return broken_bytes(rng, content)
    whole = here = json.loads(content)
    while True:
        keys = list(here) if isinstance(here, dict) else range(len(here))
        key = rng.choice(keys)
        if not (isinstance(here[key], dict | list) and here[key]) or rng.random() < 0.3:
            break
        here = here[key]
    change = rng.choice(["value", "value", "value", "delete", "rename"])
    old = here.pop(key) if change != "value" or isinstance(here, dict) else None
    if change == "value":
        here.__setitem__(key, rng.choice(VALUES))
    elif change == "rename" and isinstance(here, dict):
        here[rng.choice(["", "x", "é" * 99])] = old
    return json.dumps(whole).encode()


def broken_rows(rng: random.Random, content: bytes) -> bytes:
    """A JSON Lines file with one line broken."""
    lines = content.splitlines()
    number = rng.randrange(len(lines))
    lines[number] = broken_json(rng, lines[number])
    return b"\n".join(lines) + b"\n"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder of whole files, and where the tests write the broken ones."""
    path = tmp_path_factory.mktemp("whole")
    save_tiny_folder(path / "dream", positions=64)
    model = DreamModel.from_pretrained(path / "dream")
    model.save_pretrained(path / "sharded", max_shard_size="150KB")
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    SafeCheckpointIO().save_checkpoint(
        {"state_dict": state, "dream_config": model.config.to_dict()}, path / "last.ckpt"
    )
    rows = [{key: row[key] for key in ("question", "solution", "attempt")} for row in addition_rows(8)]
    rows = [{"question": row["question"], "response": row["attempt"], "answer": row["solution"]} for row in rows]
    write_jsonl(path / "rows.jsonl", rows)
    (path / "rows.json").write_text(json.dumps(rows))
    with (path / "rows.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    pa.parquet.write_table(pa.Table.from_pylist(rows), path / "rows.parquet")
    datasets.Dataset.from_list(rows).save_to_disk(path / "arrow")
    write_jsonl(
        path / "messages.jsonl", [{"messages": [{"role": r, "content": "1"} for r in ("user", "assistant")]}] * 3
    )
    predictions = PredictionFile(path / "p.jsonl")
    predictions.open({"seed": 1})
    predictions.write_settings({"seed": 1})
    predictions.append(0, {n: {"prediction": "x"} for n in range(4)})
    predictions.close()
    return path


def same_examples(path: Path) -> None:
    examples = read_examples(path)
    assert examples and all(example.prompt and isinstance(example.answer, str) for example in examples)


def same_model(path: Path) -> None:
    model = DreamModel.from_pretrained(path)
    logits = model(torch.tensor([[1, 2, 3]])).logits
    assert logits.isfinite().all() and logits.shape == (1, 3, model.config.vocab_size)


def same_tokenizer(path: Path) -> None:
    tokenizer = load_tokenizer(path)
    text = "2+2=? é <think>"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len({tokenizer.mask_token_id, tokenizer.eos_token_id}) == 2


def same_checkpoint(path: Path) -> None:
    model, _ = model_from_checkpoint(path)
    assert model(torch.tensor([[1, 2]])).logits.isfinite().all()


def same_predictions(path: Path) -> None:
    file = PredictionFile(path.parent / "p.jsonl")
    try:
        file.open({"seed": 1})
    finally:
        file.close()


# Kind → how to read it, how to break it, the file that is broken, and what is copied for it.
FILES = {
    "rows.jsonl": (same_examples, broken_rows, "rows.jsonl", 20),
    "rows.json": (same_examples, broken_json, "rows.json", 20),
    "rows.csv": (same_examples, broken_bytes, "rows.csv", 16),
    "rows.parquet": (same_examples, broken_bytes, "rows.parquet", 16),
    "messages.jsonl": (same_examples, broken_rows, "messages.jsonl", 20),
    "arrow": (same_examples, broken_bytes, "arrow/data-00000-of-00001.arrow", 14),
    "arrow's state": (same_examples, broken_json, "arrow/state.json", 10),
    "config.json": (same_model, broken_json, "dream/config.json", 30),
    "safetensors": (same_model, broken_bytes, "dream/model.safetensors", 20),
    "index": (same_model, broken_json, "sharded/model.safetensors.index.json", 24),
    "shard": (same_model, broken_bytes, "sharded/model-00001-of-*.safetensors", 12),
    "tokenizer_config.json": (same_tokenizer, broken_json, "dream/tokenizer_config.json", 20),
    "vocab.json": (same_tokenizer, broken_json, "dream/vocab.json", 20),
    "merges.txt": (same_tokenizer, broken_bytes, "dream/merges.txt", 10),
    "checkpoint": (same_checkpoint, broken_bytes, "last.ckpt", 24),
    "settings.json": (same_predictions, broken_json, "p.jsonl.settings.json", 14),
    "predictions": (same_predictions, broken_rows, "p.jsonl.rank-0.jsonl", 14),
}


@pytest.mark.parametrize(("kind", "seed"), [(kind, seed) for kind, (*_, n) in FILES.items() for seed in range(n)])
def test_a_broken_file_is_named_or_read(whole, tmp_path, kind, seed):
    read, break_it, name, _ = FILES[kind]
    (source,) = whole.glob(name)
    top = source.relative_to(whole).parts[0]
    for item in whole.glob(f"{top.removesuffix('.settings.json').removesuffix('.rank-0.jsonl')}*"):
        (shutil.copytree if item.is_dir() else shutil.copy)(item, tmp_path / item.name)
    broken = tmp_path / source.relative_to(whole)
    rng = random.Random(f"{kind} {seed}")
    broken.write_bytes(break_it(rng, source.read_bytes()))
    # A wrong part may show in another file of the folder, as a tensor that the index puts elsewhere.
    outcome(lambda: read(tmp_path / top), [str(tmp_path / top), broken.name, top, "p.jsonl"])


@pytest.mark.parametrize("seed", range(20))
def test_a_broken_config_is_named_or_read(tmp_path, seed):
    rng = random.Random(f"yaml {seed}")
    file = tmp_path / "config.yaml"
    lines = shipped_configs()["tiny"].read_bytes().splitlines()
    if seed % 2:
        lines.insert(rng.randrange(len(lines)), rng.choice(lines))
        file.write_bytes(b"\n".join(lines))
    else:
        file.write_bytes(broken_bytes(rng, b"\n".join(lines)))
    outcome(lambda: check_config(file), [str(file)])


NUMBERS = [-1, 0, 1, 3, -HUGE, HUGE, 2**63, 2.5, -0.5, math.nan, math.inf, -math.inf, "x", True, 1e300, []]
OPTIONS = {
    SamplingParams: [name for name in SamplingParams.__dataclass_fields__],
    LoraParams: ["rank", "alpha", "targets"],
    S1KDataModule: [
        *("max_length", "eos_fill_to", "batch_size", "validation_draws", "validation_questions", "num_workers"),
        *("seed", "first_n", "validation_fraction"),
    ],
    tiny_module: ["cart_p", "focal_alpha", "focal_gamma", "warmup_fraction", "seed", "gradient_checkpointing"],
    quiet_trainer: [
        *("max_steps", "max_epochs", "accumulate_grad_batches", "devices", "num_nodes", "val_check_interval"),
        *("limit_val_batches", "limit_train_batches", "log_every_n_steps", "precision", "strategy", "accelerator"),
    ],
}


@pytest.mark.parametrize(("make", "name"), [(make, name) for make, names in OPTIONS.items() for name in names])
def test_a_wrong_option_is_named_or_works(make, name):
    needed = {"source": "bundled", "tokenizer": load_tokenizer("bytes")} if make is S1KDataModule else {}
    # Of the Trainer's options jsonargparse and the command line test type and size before Lightning does.
    for value in NUMBERS if make is not quiet_trainer else [-1, 0, 1, 3, 2.5, -0.5]:
        outcome(lambda value=value: make(**needed, **{name: value}), [name])
