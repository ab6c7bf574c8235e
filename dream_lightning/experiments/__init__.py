"""Several runs: sweeps over options, and one report of what differs between runs."""

from dream_lightning.experiments.report import report
from dream_lightning.experiments.sweep import sweep

__all__ = ["report", "sweep"]
