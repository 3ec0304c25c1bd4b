"""Callbacks of a calibration run, which `train.py` hands in: progress on the console, the rest in TensorBoard."""

from callbacks.activation_statistics import ActivationStatistics
from callbacks.distribution_fitting import DistributionFitting
from callbacks.event_log import EventLog
from callbacks.image_grid import ImageGrid
from callbacks.learning_curves import LearningCurves
from callbacks.progress import Progress, counting
from callbacks.run_log import RunLog, log_results

__all__ = [
    "ActivationStatistics",
    "DistributionFitting",
    "EventLog",
    "ImageGrid",
    "LearningCurves",
    "Progress",
    "RunLog",
    "counting",
    "log_results",
]
