"""A model's fast copy for inference."""

from mask_rcnn_plus.optimization.model import OptimizedModel, OptimizedRCNN
from mask_rcnn_plus.optimization.report import OptimizationReport
from mask_rcnn_plus.optimization.switch import optimize

__all__ = ["OptimizationReport", "OptimizedModel", "OptimizedRCNN", "optimize"]
