"""A fast copy of a model, for inference: :func:`optimize` in conversion.py builds it.

backbones.py, proposals.py and heads.py hold the faster parts, layers.py and onednn.py what they are
made from, wrappers.py torch.compile and CUDA graphs, model.py the copy's class and its report.
"""

from mask_rcnn_plus.optimization.conversion import optimize
from mask_rcnn_plus.optimization.model import OptimizationReport, OptimizedModel, OptimizedRCNN

__all__ = ["OptimizationReport", "OptimizedModel", "OptimizedRCNN", "optimize"]
