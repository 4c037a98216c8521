"""Setting up, training and evaluating by a config."""

from mask_rcnn_plus.engine.main import main
from mask_rcnn_plus.engine.setup import setup
from mask_rcnn_plus.engine.trainer import Trainer

__all__ = ["Trainer", "main", "setup"]
