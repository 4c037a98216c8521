"""Prediction with trained models: batches of images, and large images tile by tile."""

from mask_rcnn_plus.prediction.images import to_bgr
from mask_rcnn_plus.prediction.predictor import BatchPredictor
from mask_rcnn_plus.prediction.slicing import SlicedPredictor

__all__ = ["BatchPredictor", "SlicedPredictor", "to_bgr"]
