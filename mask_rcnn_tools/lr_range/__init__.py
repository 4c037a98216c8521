"""``mask-rcnn-plus lr-range``: finds a learning rate by training briefly while it rises."""
