"""Optimizer, checkpoints, preemption, FSDP2, and what a run logs."""

from dream_lightning.training.loss_spike import LossSpike
from dream_lightning.training.preemption import Autosave
from dream_lightning.training.progress import ProgressBar
from dream_lightning.training.samples import SampleLogger
from dream_lightning.training.summary import RunSummary
from dream_lightning.training.throughput import Throughput

__all__ = ["Autosave", "LossSpike", "ProgressBar", "RunSummary", "SampleLogger", "Throughput"]
