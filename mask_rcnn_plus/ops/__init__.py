"""RoI operators (exact, deterministic, all pyramid levels in one call) and mask pasting.

roi_ops.py has the functions, layers.py the modules, csrc/ the C++ and CUDA code. mask_rle.py pastes
masks into COCO's run lengths (csrc/mask_rle.cpp), run_lengths.py works on those. Nothing here
depends on detectron2.
"""

from mask_rcnn_plus.ops.layers import RoIAlign, RoIPool, RoIWarp
from mask_rcnn_plus.ops.library import backend, connect_kernels
from mask_rcnn_plus.ops.mask_rle import paste_masks_rle
from mask_rcnn_plus.ops.roi_ops import fpn_roi_align, roi_align, roi_pool, roi_warp

connect_kernels()

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
