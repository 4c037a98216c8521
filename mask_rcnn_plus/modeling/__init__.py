"""Components that this project registers with detectron2 or builds its heads from."""

from mask_rcnn_plus.modeling.backbone import TimmBackbone
from mask_rcnn_plus.modeling.mlp_mask_head import MLPMaskHead
from mask_rcnn_plus.modeling.optimization import OptimizedModel, OptimizedRCNN, optimize
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
    "OptimizedModel",
    "OptimizedRCNN",
    "PastedMasks",
    "RunLengthMasks",
    "SoftmaxMaskHead",
    "TimmBackbone",
    "optimize",
    "postprocess",
]
