"""A callback that kills the run which the command line starts, at a moment that the machine's speed does not move."""

import os
import signal
import time
from pathlib import Path

import lightning as L


class KillAllInPrediction(L.Callback):
    """SIGKILL to all processes of the session, from the first one after its `batches`, when others have answers too.

    They continue meanwhile, but not to the end, where they would wait for the first.
    """

    def __init__(self, batches: int, folder: str) -> None:
        self.batches, self.folder = batches, Path(folder)

    def on_predict_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        if trainer.is_global_zero and batch_idx + 1 == self.batches:
            while sum(b"\n" in part.read_bytes() for part in self.folder.glob("*.rank-*.jsonl")) < trainer.world_size:
                time.sleep(0.01)
            os.killpg(0, signal.SIGKILL)
