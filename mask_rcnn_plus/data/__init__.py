"""Data sets: registered by folder, checked when loaded, or generated."""

from mask_rcnn_plus.data.batches import Batches
from mask_rcnn_plus.data.build import build_train_batches
from mask_rcnn_plus.data.folders import dataset_root, register_folder_datasets
from mask_rcnn_plus.data.loading import class_names, require_dataset
from mask_rcnn_plus.data.mapper import NamingMapper
from mask_rcnn_plus.data.shapes import generate_shapes

__all__ = [
    "Batches",
    "NamingMapper",
    "build_train_batches",
    "class_names",
    "dataset_root",
    "generate_shapes",
    "register_folder_datasets",
    "require_dataset",
]
