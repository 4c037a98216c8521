"""Components that this project registers with detectron2 or builds its heads from."""

from mask_rcnn_plus.modeling.backbone import TimmBackbone
from mask_rcnn_plus.modeling.pooler import FusedROIPooler
from mask_rcnn_plus.modeling.roi_heads import FusedROIHeads

__all__ = ["FusedROIHeads", "FusedROIPooler", "TimmBackbone"]
