"""`python kill_runs.py FOLDER KILLS SEED`: train until the run has been killed KILLS times, then to its end.

Python and its imports are loaded once; every attempt is a fork of this process. Prints a line of JSON an attempt: the
moment that was chosen for the kill, and what it left half written.
"""

import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from material import addition_rows, write_jsonl

from dream_lightning import DreamModule, S1KDataModule, SamplingParams
from dream_lightning.callbacks import Autosave
from dream_lightning.saving import SafeCheckpointIO

STEPS = 200
MOMENTS = ("any time", "after a save", "in a save")


def train(folder: Path, devices: int = 1, steps: int = STEPS) -> None:
    """What `fit --ckpt_path last` does with base.yaml, smaller."""
    torch.manual_seed(0)
    module = DreamModule(
        new_model={"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2},
        tokenizer="bytes",
        optimizer=lambda groups: torch.optim.AdamW(groups, lr=1e-3),
        sampling=SamplingParams(max_new_tokens=4, steps=2),
    )
    data = S1KDataModule(
        str(folder.parent / "sums.jsonl"),
        tokenizer=module.tokenizer,
        batch_size=2,
        validation_questions=1,
        cache_dir=str(folder.parent / "cache"),
    )
    trainer = L.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        use_distributed_sampler=False,
        max_steps=steps,
        accumulate_grad_batches=2,
        gradient_clip_val=1.0,
        limit_val_batches=1,
        val_check_interval=20,
        check_val_every_n_epoch=None,
        callbacks=[
            ModelCheckpoint(folder, filename="best-{step}", monitor="val/nll", enable_version_counter=False),
            Autosave(folder, every_n_train_steps=1, save_top_k=0, save_last=True),
        ],
        plugins=[SafeCheckpointIO()],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data, ckpt_path="last", weights_only=True)


def attempt(folder: Path, **options: int) -> int:
    """Fork a process that trains; returns its id."""
    pid = os.fork()
    if pid:
        return pid
    output = os.open(folder.parent / f"{folder.name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    code = 1
    try:
        train(folder, **options)
        code = 0
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def written(folder: Path) -> int:
    """When last.ckpt was put there, 0 for never."""
    try:
        return (folder / "last.ckpt").stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def kill_at(moment: str, pid: int, folder: Path, chance: random.Random) -> bool:
    """Kill the process at such a moment; False if it ended before."""

    def wait_for(what) -> bool:
        while not what():
            if os.waitpid(pid, os.WNOHANG)[0]:
                return False
            time.sleep(0.0005)
        return True

    def next_save() -> bool:
        before = written(folder)
        return wait_for(lambda: written(folder) != before)

    def wait(seconds: float) -> bool:
        end = time.monotonic() + seconds
        return wait_for(lambda: time.monotonic() > end)

    if moment == "any time":
        alive = wait(chance.uniform(0, 0.6))
    else:
        alive = all(next_save() for _ in range(chance.randint(1, 6))) and wait(chance.uniform(0, 0.05))
        if moment == "in a save":
            alive = alive and wait_for((folder / "last.ckpt.partial").exists)
    if alive:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return alive


def run(folder: Path, kills: int, seed: int) -> None:
    torch.set_num_threads(1)
    chance = random.Random(seed)
    write_jsonl(folder.parent / "sums.jsonl", addition_rows(40))
    for i in range(kills):
        moment = MOMENTS[i % len(MOMENTS)]
        killed = kill_at(moment, attempt(folder), folder, chance)
        left = sorted(path.name for path in folder.glob("*.partial"))
        print(json.dumps({"moment": moment, "killed": killed, "left": left}), flush=True)
    _, status = os.waitpid(attempt(folder), 0)
    print(json.dumps({"exit": os.waitstatus_to_exitcode(status)}))


if __name__ == "__main__":
    run(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
