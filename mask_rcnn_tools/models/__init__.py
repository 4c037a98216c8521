"""The command ``mask-rcnn-plus models``, and what is known of detectron2's model zoo."""
