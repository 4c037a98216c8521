"""``mask-rcnn-plus doctor``: examines the installation. Imports nothing of the plugin."""
