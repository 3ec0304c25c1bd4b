"""Lightning callbacks of a calibration run: thin hooks over the library's accumulators and figures."""

from callbacks.activation_statistics import ActivationStatistics
from callbacks.distribution_fitting import DistributionFitting
from callbacks.image_grid import ImageGrid
from callbacks.learning_curves import LearningCurves
from callbacks.progress import Progress

__all__ = ["ActivationStatistics", "DistributionFitting", "ImageGrid", "LearningCurves", "Progress"]
