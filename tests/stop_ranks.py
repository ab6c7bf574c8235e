"""`python stop_ranks.py FOLDER PORT PORT`: two processes as torchrun starts them, SIGTERM to the second; then resumed.

Each attempt has a port of its own. Prints the exit statuses of both attempts as JSON. Started by test_kills.py.
"""

import json
import os
import signal
import sys
from pathlib import Path

import lightning as L
import torch
from kill_runs import attempt, end, train
from lightning.pytorch.loops import _TrainingEpochLoop
from material import addition_rows, write_jsonl


class Terminated(L.Callback):
    """A scheduler stops the second process only."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_rank == 1 and trainer.global_step == 7 and batch_idx % 2 == 0:  # of two micro-batches
            signal.raise_signal(signal.SIGTERM)


def statuses(folder: Path, port: str, *callbacks: L.Callback) -> list[int]:
    os.environ |= {"MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"TORCHELASTIC_RUN_ID": "test", "GROUP_RANK": "0"}
    pids = []
    for rank in ("0", "1"):
        os.environ |= {"RANK": rank, "LOCAL_RANK": rank}
        pids.append(attempt(lambda: train(folder, devices=2, steps=40, callbacks=callbacks), folder))
    return [end(pid) for pid in pids]


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    write_jsonl(folder.parent / "sums.jsonl", addition_rows(40))
    # Before every micro-batch Lightning would ask whether a process was told to stop, which synchronizes with the GPU.
    _TrainingEpochLoop._broadcast_sigterm_tensor = None
    print(json.dumps({"stopped": statuses(folder, sys.argv[2], Terminated())}))
    print(json.dumps({"whole": statuses(folder, sys.argv[3])}))
