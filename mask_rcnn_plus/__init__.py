"""Mask R-CNN components for detectron2."""

from mask_rcnn_plus import compat

compat.apply()

from mask_rcnn_plus.config import add_mask_rcnn_plus_config, get_cfg  # noqa: E402

__all__ = ["add_mask_rcnn_plus_config", "get_cfg"]
