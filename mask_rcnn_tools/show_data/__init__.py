"""``mask-rcnn-plus show-data``: draws training images as the model sees them."""
