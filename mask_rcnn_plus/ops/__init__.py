"""RoI operators: exact, repeatable, all pyramid levels in one call; detectron2 is unknown here."""

from mask_rcnn_plus.ops.layers import RoIAlign
from mask_rcnn_plus.ops.library import backend
from mask_rcnn_plus.ops.roi_ops import fpn_roi_align, roi_align

__all__ = ["RoIAlign", "backend", "fpn_roi_align", "roi_align"]
