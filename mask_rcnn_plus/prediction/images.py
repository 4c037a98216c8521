"""What predictors accept as an image; see ``data/pixels.py``."""

from mask_rcnn_plus.data.pixels import BGR, to_bgr

__all__ = ["BGR", "to_bgr"]
