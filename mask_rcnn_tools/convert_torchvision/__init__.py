"""``mask-rcnn-plus convert-torchvision``: torchvision's weights for detectron2."""

from mask_rcnn_tools.lazy import names_of

__getattr__ = names_of(__name__, command=("CONFIG",), conversion=("convert", "parameter_names"))
