"""Converts the labels of other tools into COCO json, as a data set folder."""

from mask_rcnn_tools.lazy import names_of

__getattr__ = names_of(
    __name__, labels=("LabelledImage", "LabelledObject", "Labels"), writing=("Plan", "write_coco")
)
