"""Labels of other tools into COCO json, in the layout of a data set by folder."""

from mask_rcnn_tools.convert import labelme, masks, via, voc, yolo
from mask_rcnn_tools.convert.found import Found, Picture, Thing
from mask_rcnn_tools.convert.writing import Plan, write_coco

__all__ = [
    "Found",
    "Picture",
    "Plan",
    "Thing",
    "labelme",
    "masks",
    "via",
    "voc",
    "write_coco",
    "yolo",
]
