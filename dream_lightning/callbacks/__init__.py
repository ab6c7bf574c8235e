"""Lightning callbacks of the base configuration."""

from dream_lightning.callbacks.answer_file import read_predictions
from dream_lightning.callbacks.autosave import Autosave
from dream_lightning.callbacks.predictions import PredictionWriter
from dream_lightning.callbacks.progress import ProgressBar
from dream_lightning.callbacks.samples import SampleLogger
from dream_lightning.callbacks.throughput import Throughput

__all__ = ["Autosave", "PredictionWriter", "ProgressBar", "SampleLogger", "Throughput", "read_predictions"]
