"""``mask-rcnn-plus predict``: finds objects in images, folders and videos."""
