"""The command ``mask-rcnn-plus models``, and the models of detectron2's zoo by name."""
