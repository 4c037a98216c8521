"""Benchmarks and ablations, run from a clone: ``uv run python -m benchmarks.roi_align --help``."""

import mask_rcnn_plus  # noqa: F401  (repairs detectron2 before a benchmark imports it)
