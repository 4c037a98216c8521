"""``mask-rcnn-plus doctor``: what is installed and whether it works."""
