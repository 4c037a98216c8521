"""Trains or evaluates a Mask R-CNN by a config: see ``python train_net.py --help``."""

import sys

import mask_rcnn_plus  # noqa: F401  (mends and extends detectron2 before anything imports it)
from mask_rcnn_plus.engine import main

if __name__ == "__main__":
    sys.exit(main())
