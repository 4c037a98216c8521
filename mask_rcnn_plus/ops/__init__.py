"""RoI operators: exact, repeatable, all pyramid levels in one call; and masks pasted into runs.

detectron2 is unknown here.
"""

from mask_rcnn_plus.ops.layers import RoIAlign, RoIPool, RoIWarp
from mask_rcnn_plus.ops.library import backend
from mask_rcnn_plus.ops.mask_rle import paste_masks_rle
from mask_rcnn_plus.ops.roi_ops import fpn_roi_align, roi_align, roi_pool, roi_warp

__all__ = [
    "RoIAlign",
    "RoIPool",
    "RoIWarp",
    "backend",
    "fpn_roi_align",
    "paste_masks_rle",
    "roi_align",
    "roi_pool",
    "roi_warp",
]
