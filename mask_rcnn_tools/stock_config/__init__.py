"""``mask-rcnn-plus stock-config``: a config for programs that only know detectron2."""
