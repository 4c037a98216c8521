"""Converts the labels of other tools into COCO json, as a data set folder."""

from mask_rcnn_tools.convert import coco, cvat, label_studio, labelme, masks, via, voc, yolo
from mask_rcnn_tools.convert.labels import LabelledImage, LabelledObject, Labels
from mask_rcnn_tools.convert.writing import Plan, write_coco

__all__ = [
    "LabelledImage",
    "LabelledObject",
    "Labels",
    "Plan",
    "coco",
    "cvat",
    "label_studio",
    "labelme",
    "masks",
    "via",
    "voc",
    "write_coco",
    "yolo",
]
