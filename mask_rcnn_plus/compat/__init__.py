"""detectron2 0.6 on today's torch, NumPy, Pillow, setuptools and Python."""

from mask_rcnn_plus.compat.patches import apply

__all__ = ["apply"]
