"""Converts the labels of other tools into COCO json, as a data set folder."""
