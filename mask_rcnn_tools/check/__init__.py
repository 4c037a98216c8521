"""The data check: finds the problems of a COCO json and its images, and repairs the json."""

from mask_rcnn_tools.check.checking import check_coco, note_leaks, repair_coco
from mask_rcnn_tools.check.images import MODES
from mask_rcnn_tools.check.problems import ERROR, KINDS, NOTE, WARNING, Problem
from mask_rcnn_tools.check.repair import Repaired
from mask_rcnn_tools.check.result import CheckResult, describe, write_json
from mask_rcnn_tools.check.statistics import AnchorSettings

__all__ = [
    "ERROR",
    "KINDS",
    "MODES",
    "NOTE",
    "WARNING",
    "AnchorSettings",
    "CheckResult",
    "Problem",
    "Repaired",
    "check_coco",
    "describe",
    "note_leaks",
    "repair_coco",
    "write_json",
]
