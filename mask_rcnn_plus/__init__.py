"""Mask R-CNN for detectron2.

``import mask_rcnn_plus`` repairs the installed detectron2 (see ``compat``) and registers this
project's components. detectron2's catalogs then find the data sets below ``$DETECTRON2_DATASETS``
when they are first asked for one; the import reads no folder.
"""

from mask_rcnn_plus import compat

compat.apply()

# After compat, which makes detectron2.modeling importable.
from mask_rcnn_plus import device, modeling  # noqa: E402, F401
from mask_rcnn_plus.config import add_mask_rcnn_plus_config, get_cfg, load_config  # noqa: E402
from mask_rcnn_plus.config.stock import accept_our_keys  # noqa: E402
from mask_rcnn_plus.data import register_folder_datasets  # noqa: E402
from mask_rcnn_plus.data.folders import extend_catalogs  # noqa: E402
from mask_rcnn_plus.engine.weights import read_class_names  # noqa: E402
from mask_rcnn_plus.errors import UserError  # noqa: E402
from mask_rcnn_plus.optimization import optimize  # noqa: E402
from mask_rcnn_plus.prediction import BatchPredictor, SlicedPredictor  # noqa: E402

device.extend_detectron2()
accept_our_keys()
extend_catalogs()

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
