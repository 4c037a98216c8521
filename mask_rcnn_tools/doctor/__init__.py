"""``mask-rcnn-plus doctor``: examines the installation. Imports nothing from the plugin."""
