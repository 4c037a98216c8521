"""The data check: finds the problems of a COCO json and its images, and repairs the json."""
