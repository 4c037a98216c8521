"""Components that detectron2 builds from a config: backbones, ROI heads, poolers, mask heads.

To add a mask head, write a subclass of detectron2's ``BaseMaskRCNNHead`` with
``@ROI_MASK_HEAD_REGISTRY.register()`` in mask_heads.py and set ``MODEL.ROI_MASK_HEAD.NAME`` to its
name. Box and keypoint heads (``ROI_BOX_HEAD_REGISTRY``, ``ROI_KEYPOINT_HEAD_REGISTRY``) and
backbones (``BACKBONE_REGISTRY``, in backbone.py) work the same way, in any module that this one
imports.
"""

import importlib

from mask_rcnn_plus.modeling.backbone import TimmBackbone
from mask_rcnn_plus.modeling.mask_heads import MLPMaskHead, SoftmaxMaskHead
from mask_rcnn_plus.modeling.masks import PastedMasks, RunLengthMasks
from mask_rcnn_plus.modeling.pooler import FusedROIPooler
from mask_rcnn_plus.modeling.postprocessing import postprocess
from mask_rcnn_plus.modeling.roi_heads import (
    FusedCascadeROIHeads,
    FusedRes5ROIHeads,
    FusedROIHeads,
)

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
    # Code that was written for older versions imports these names from here. Importing them above
    # would be circular, since optimization imports modeling.
    if name in ("OptimizedModel", "OptimizedRCNN", "optimize"):
        return getattr(importlib.import_module("mask_rcnn_plus.optimization"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
