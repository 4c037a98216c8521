"""The data check: finds the problems of a COCO json and its images, and repairs the json."""

from mask_rcnn_tools.lazy import names_of

__getattr__ = names_of(
    __name__,
    checking=("check_coco", "note_leaks", "repair_coco"),
    problems=("ERROR", "KINDS", "NOTE", "WARNING", "Problem"),
    repair=("Repaired",),
    result=("CheckResult", "describe"),
    statistics=("AnchorSettings",),
)
