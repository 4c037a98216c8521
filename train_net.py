"""Trains or evaluates a Mask R-CNN by a config: see ``python train_net.py --help``."""

import sys

import mask_rcnn_plus  # noqa: F401  (repairs and extends detectron2 before anything imports it)
from mask_rcnn_plus.engine import main

try:
    from mask_rcnn_tools.check.before_run import check_data
except ImportError:  # The plugin trains and evaluates without the tools.
    check_data = None

if __name__ == "__main__":
    sys.exit(main(check_data=check_data))
