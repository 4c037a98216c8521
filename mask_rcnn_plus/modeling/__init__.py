"""Components that this project registers with detectron2 or builds its heads from."""

import importlib

from mask_rcnn_plus.modeling.backbone import TimmBackbone
from mask_rcnn_plus.modeling.mlp_mask_head import MLPMaskHead
from mask_rcnn_plus.modeling.pooler import FusedROIPooler
from mask_rcnn_plus.modeling.postprocessing import PastedMasks, postprocess
from mask_rcnn_plus.modeling.roi_heads import (
    FusedCascadeROIHeads,
    FusedRes5ROIHeads,
    FusedROIHeads,
)
from mask_rcnn_plus.modeling.run_length_masks import RunLengthMasks
from mask_rcnn_plus.modeling.softmax_mask_head import SoftmaxMaskHead

__all__ = [
    "FusedCascadeROIHeads",
    "FusedROIHeads",
    "FusedROIPooler",
    "FusedRes5ROIHeads",
    "MLPMaskHead",
    "PastedMasks",
    "RunLengthMasks",
    "SoftmaxMaskHead",
    "TimmBackbone",
    "postprocess",
]


def __getattr__(name: str) -> object:
    # These names stood here before they moved; optimization imports modeling, so not at the top.
    if name in ("OptimizedModel", "OptimizedRCNN", "optimize"):
        return getattr(importlib.import_module("mask_rcnn_plus.optimization"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
