"""``mask-rcnn-plus convert-torchvision``: torchvision's weights for detectron2."""
