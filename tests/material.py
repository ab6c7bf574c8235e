"""Helpers of tests: paths of shared material, rows, small models, trainers."""

import json
import os
from pathlib import Path

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.util.tensor_util import make_ndarray

from dream_lightning import DreamConfig, DreamModel, DreamModule, S1KDataModule, SamplingParams, load_tokenizer
from dream_lightning.adapters import LoraParams, add_lora
from dream_lightning.export import save_tokenizer
from dream_lightning.model_factory import random_model
from dream_lightning.training.fsdp import local

SHARED = Path(os.environ.get("DREAM_SHARED", Path(__file__).resolve().parents[2] / "shared"))
# Of a Dream that trains in milliseconds.
SIZES = {
    **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "max_position_embeddings": 512},
}


def shared_path(relative: str) -> Path:
    path = SHARED / relative
    if not path.exists():
        pytest.skip(f"{path} is not here: set DREAM_SHARED to the folder that holds golden/ and data/")
    return path


def tiny_module(kind=DreamModule, **options) -> DreamModule:
    """With new weights, the same every time."""
    torch.manual_seed(0)
    defaults = {"new_model": SIZES, "tokenizer": "bytes", "optimizer": lambda p: torch.optim.AdamW(p, lr=3e-3)}
    return kind(**defaults | {"sampling": SamplingParams(max_new_tokens=24, steps=8, forbid_mask=True)} | options)


def tiny_data(source, folder, **options) -> S1KDataModule:
    """Of the bytes tokenizer, cached in `folder`."""
    defaults = {"validation_questions": 3, "cache_dir": str(folder / "cache"), "batch_size": 4}
    return S1KDataModule(str(source), **{"tokenizer": load_tokenizer("bytes"), **defaults, **options})


def quiet_trainer(*callbacks, **options) -> L.Trainer:
    """On the CPU, by default without bars and logs, and without checkpoints unless a callback saves them."""
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
    callbacks = options.pop("callbacks", None) or list(callbacks)
    quiet["enable_checkpointing"] = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    return L.Trainer(**{"accelerator": "cpu", **quiet, **options}, callbacks=callbacks)


def short_trainer(folder, *callbacks, **options) -> L.Trainer:
    """Six steps by default, without validation."""
    defaults = {"num_sanity_val_steps": 0, "limit_val_batches": 0, "max_steps": 6, "default_root_dir": folder}
    return quiet_trainer(*callbacks, **defaults | options)


class Recorder(L.Callback):
    """Keeps the loss, the gradient (its shard) and its norm of every optimizer step of a run."""

    def __init__(self):
        self.losses, self.gradients, self.norms = [], [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step > len(self.losses) + self.first:  # not in the middle of accumulation
            self.losses.append(trainer.callback_metrics["train/loss"].item())
            self.norms.append(trainer.callback_metrics["train/gradient_norm"].item())
            gradients = [local(p.grad).flatten() for p in pl_module.parameters() if p.grad is not None]
            self.gradients.append(torch.cat(gradients))

    def on_train_start(self, trainer, pl_module):
        self.first = trainer.global_step


def logged(folder: Path) -> dict[tuple[str, int], set[str]]:
    """(scalar, step) → its values, from the TensorBoard files of all attempts in a folder."""
    values = {}
    for file in folder.rglob("events.out.*"):
        for event in EventFileLoader(str(file)).Load():
            for value in event.summary.value:
                if value.tag != "hp_metric":
                    as_text = str(make_ndarray(value.tensor))  # NaN equals NaN
                    values.setdefault((value.tag, event.step), set()).add(as_text)
    return values


def addition_rows(count: int, *, start: int = 0) -> list[dict]:
    """s1K-shaped rows with traces of different lengths."""
    rows = []
    for i in range(start, start + count):
        a, b = 7 * i % 100, 13 * i % 100
        trace = "carry " * (i % 5 + 1) + str(a + b)
        answers = {"solution": str(a + b), "thinking_trajectories": [trace], "attempt": rf"\boxed{{{a + b}}}"}
        rows.append({"question": f"{a} + {b} = ? ({i})", "cot_type": "math", "source_type": "sum", **answers})
    return rows


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def save_tiny_folder(path: Path, *, positions: int = 512, dtype: torch.dtype = torch.float32, seed: int = 0) -> str:
    """An official-format folder of a random Dream with the bytes tokenizer."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = random_model({**sizes, "max_position_embeddings": positions}, load_tokenizer("bytes"))
    model.to(dtype).save_pretrained(path)
    save_tokenizer("bytes", path)
    return str(path)


def random_dream(**sizes) -> DreamModel:
    """64 tokens, 2 layers; always the same weights."""
    torch.manual_seed(0)
    default = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"mask_token_id": 1, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 0}
    return DreamModel(DreamConfig(**{"vocab_size": 64, "num_key_value_heads": 2, **default, **ids, **sizes}))


def fit_on(rows: Path, module: L.LightningModule, *, ckpt_path=None, batch_size=4, **options) -> L.Trainer:
    """Train in bf16-mixed on a file of rows, without validation."""
    data = S1KDataModule(
        str(rows), tokenizer=module.tokenizer, batch_size=batch_size, validation_questions=0, cache_dir=f"{rows}.cache"
    )
    trainer = quiet_trainer(**{"precision": "bf16-mixed", "limit_val_batches": 0, **options})
    trainer.fit(module, data, ckpt_path=ckpt_path, weights_only=True)
    return trainer


def loss_after_60_steps(model: DreamModel) -> float:
    """Of adapters on a model, which learn to name the next number; ln 64 = 4.16 before."""
    torch.manual_seed(0)
    add_lora(model, LoraParams(rank=8, targets="all-linear"), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(60):
        ids = torch.randint(0, 64, (8, 1)) + torch.arange(12) & 63
        loss = F.cross_entropy(model(ids).logits.float()[:, 3:9].flatten(0, 1), ids[:, 4:10].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()
