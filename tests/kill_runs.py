"""`kills(FOLDER, KILLS, SEED)`: train until the run was killed KILLS times, then to its end.

This run is in FOLDER/killed, and one without kills in FOLDER/whole. Prints a line of JSON for each kill: its moment,
how the attempt ended, what it left incomplete and the step it left saved; then one with the exit statuses of both runs.
The kills do not depend on the speed of the machine.

`terminated(FOLDER, PORT, PORT)`: two processes as torchrun starts them, SIGTERM to the second; resumed. Prints
the exit statuses of both attempts, each with a port of its own.
"""

import json
import os
import random
import re
import resource
import signal
from collections.abc import Callable
from itertools import count
from pathlib import Path

import lightning as L
import torch
from kill_points import Watch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.loops import _TrainingEpochLoop
from material import SIZES, addition_rows, quiet_trainer, tiny_data, tiny_module, write_jsonl
from meeting import end, fork, ranks

from dream_lightning import SamplingParams
from dream_lightning.training import Autosave
from dream_lightning.training.checkpointing import SafeCheckpointIO


def train(folder: Path, *callbacks: L.Callback, devices: int = 1, steps: int = 120) -> None:
    """What `fit --ckpt_path last` does with base.yaml, smaller."""
    sampling = SamplingParams(max_new_tokens=4, steps=2)
    module = tiny_module(new_model=SIZES | {"num_hidden_layers": 1}, sampling=sampling)
    data = tiny_data(folder.parent / "sums.jsonl", folder.parent, batch_size=2, validation_questions=1)
    trainer = quiet_trainer(
        *callbacks,
        ModelCheckpoint(folder, filename="best-{step}", monitor="val/nll", enable_version_counter=False),
        Autosave(folder, every_n_train_steps=1, save_top_k=0, save_last=True),
        **{"devices": devices, "strategy": "ddp" if devices > 1 else "auto", "max_steps": steps},
        **{"accumulate_grad_batches": 2, "gradient_clip_val": 1.0, "use_distributed_sampler": False},
        **{"limit_val_batches": 1, "val_check_interval": 20, "check_val_every_n_epoch": None, "log_every_n_steps": 1},
        plugins=[SafeCheckpointIO()],
        logger=TensorBoardLogger(folder.parent, name=f"{folder.name}.logs") if devices == 1 else False,
    )
    trainer.fit(module, data, ckpt_path="last", weights_only=True)


def attempt(work: Callable[[], None], folder: Path) -> int:
    return fork(work, folder.parent / f"{folder.name}.log")


def killed_at_change(folder: Path, watched: Path, number: int, is_one: Callable[[str], bool], kill: Callable) -> None:
    """Train, and call `kill` before the n-th such change of the files in `watched`."""
    numbers = count()

    def before_change(what: str) -> None:
        if is_one(what) and next(numbers) == number:
            kill()

    with Watch(watched, before_change):
        train(folder)


def killed_in_save(folder: Path, save: int, size: int) -> None:
    """Train until the n-th save has written so many bytes: the kernel ends a process at its limit of a file's size."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    is_save = re.compile(r"open last\.ckpt\..*\.partial").fullmatch
    killed_at_change(folder, folder, save, is_save, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)))


def kill(moment: str, folder: Path, chance: random.Random) -> int:
    """Train up to such a moment; returns how it ended."""
    if moment == "before a change":
        number, die = chance.randrange(50), lambda: os.kill(os.getpid(), signal.SIGKILL)
        return end(attempt(lambda: killed_at_change(folder, folder.parent, number, lambda what: True, die), folder))
    save, size = chance.randrange(5), chance.randrange(20_000)
    return end(attempt(lambda: killed_in_save(folder, save, size), folder))


def kills(folder: Path, kill_count: int, seed: int) -> None:
    chance = random.Random(seed)
    whole, killed = (folder / name / "checkpoints" for name in ("whole", "killed"))
    for checkpoints in (whole, killed):
        checkpoints.parent.mkdir(parents=True)
        write_jsonl(checkpoints.parent / "sums.jsonl", addition_rows(40))
    alone = attempt(lambda: train(whole), whole)
    for i in range(kill_count):
        moment, last = ("before a change", "in a save")[i % 2], killed / "last.ckpt"
        seen = {"moment": moment, "exit": kill(moment, killed, chance)}
        seen["left"] = sorted(path.name for path in killed.glob("*.partial"))
        seen["saved"] = torch.load(last, weights_only=True)["global_step"] if last.exists() else 0
        print(json.dumps(seen), flush=True)
    print(json.dumps({"whole": end(alone), "killed": end(attempt(lambda: train(killed), killed))}))


class Terminated(L.Callback):
    """A scheduler stops the second process only."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_rank == 1 and trainer.global_step == 7 and batch_idx % 2 == 0:  # of two micro-batches
            signal.raise_signal(signal.SIGTERM)


def statuses(folder: Path, port: str, *callbacks: L.Callback) -> list[int]:
    os.environ |= {"MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
    return ranks(lambda: train(folder, *callbacks, devices=2, steps=40), folder.parent / f"{folder.name}.log")


def terminated(folder: Path, first_port: str, second_port: str) -> None:
    write_jsonl(folder.parent / "sums.jsonl", addition_rows(40))
    # Before every micro-batch Lightning would ask whether a process was told to stop, which synchronizes with the GPU.
    _TrainingEpochLoop._broadcast_sigterm_tensor = None
    print(json.dumps([statuses(folder, first_port, Terminated()), statuses(folder, second_port)]))
