"""The commands ``mask-rcnn-plus ...``. Imports nothing: help and the doctor start without torch."""
