"""``mask-rcnn-plus fit-anchors``: finds anchors that cover the boxes of a data set."""
