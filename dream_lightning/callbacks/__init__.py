"""Lightning callbacks of the base configuration."""

from dream_lightning.callbacks.predictions import PredictionWriter, read_predictions
from dream_lightning.callbacks.samples import SampleLogger
from dream_lightning.callbacks.throughput import Throughput

__all__ = ["PredictionWriter", "SampleLogger", "Throughput", "read_predictions"]
