"""Components that this project registers with detectron2 or builds its heads from."""

from mask_rcnn_plus.modeling.pooler import FusedROIPooler

__all__ = ["FusedROIPooler"]
