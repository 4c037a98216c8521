"""``mask-rcnn-plus report``: one HTML page of an evaluation."""
