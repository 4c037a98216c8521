"""Mask R-CNN for detectron2.

``import mask_rcnn_plus`` first mends the installed detectron2 (see ``compat``), then registers this
project's components and the data sets below ``$DETECTRON2_DATASETS``.
"""

from mask_rcnn_plus import compat

compat.apply()

# The order matters: what follows imports detectron2's modeling, which compat has made importable.
from mask_rcnn_plus import device, modeling  # noqa: E402, F401
from mask_rcnn_plus.config import add_mask_rcnn_plus_config, get_cfg, load_config  # noqa: E402
from mask_rcnn_plus.data import formats, register_folder_datasets  # noqa: E402
from mask_rcnn_plus.engine.weights import read_class_names  # noqa: E402
from mask_rcnn_plus.errors import UserError  # noqa: E402
from mask_rcnn_plus.optimization import optimize  # noqa: E402
from mask_rcnn_plus.prediction import BatchPredictor, SlicedPredictor  # noqa: E402

device.extend_detectron2()
formats.restrict_detectron2()
register_folder_datasets()

__all__ = [
    "BatchPredictor",
    "SlicedPredictor",
    "UserError",
    "add_mask_rcnn_plus_config",
    "get_cfg",
    "load_config",
    "optimize",
    "read_class_names",
    "register_folder_datasets",
]
