"""Trained models on people's pictures: batches of any kind of them, and large ones tile by tile."""

from mask_rcnn_plus.prediction.images import to_bgr
from mask_rcnn_plus.prediction.predictor import BatchPredictor
from mask_rcnn_plus.prediction.slicing import SlicedPredictor

__all__ = ["BatchPredictor", "SlicedPredictor", "to_bgr"]
