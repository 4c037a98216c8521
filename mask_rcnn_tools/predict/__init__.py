"""``mask-rcnn-plus predict``: objects in images, folders and videos."""
