"""Data sets: registered by folder, checked when loaded, or generated."""

from mask_rcnn_plus.data.batches import Batches
from mask_rcnn_plus.data.build import (
    build_test_batches,
    build_train_batches,
    build_train_mapper,
)
from mask_rcnn_plus.data.folders import dataset_root, register_folder_datasets, use_json
from mask_rcnn_plus.data.loading import (
    class_names,
    coco_files,
    require_dataset,
    require_registered,
)
from mask_rcnn_plus.data.mapper import (
    NamingMapper,
    PolygonMapper,
    SafeDatasetMapper,
    require_flip_map,
)
from mask_rcnn_plus.data.shapes import generate_shapes

__all__ = [
    "Batches",
    "NamingMapper",
    "PolygonMapper",
    "SafeDatasetMapper",
    "build_test_batches",
    "build_train_batches",
    "build_train_mapper",
    "class_names",
    "coco_files",
    "dataset_root",
    "generate_shapes",
    "register_folder_datasets",
    "require_dataset",
    "require_flip_map",
    "require_registered",
    "use_json",
]
