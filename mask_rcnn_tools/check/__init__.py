"""The data check: every problem of a COCO json and its images, and how it can be mended."""

from mask_rcnn_tools.check.cache import write_whole
from mask_rcnn_tools.check.checking import check_coco, mend, note_leaks
from mask_rcnn_tools.check.images import MODES
from mask_rcnn_tools.check.problems import ERROR, KINDS, NOTE, WARNING, Problem
from mask_rcnn_tools.check.repair import Repaired
from mask_rcnn_tools.check.report import Report, describe, write_json
from mask_rcnn_tools.check.statistics import AnchorSettings

__all__ = [
    "ERROR",
    "KINDS",
    "MODES",
    "NOTE",
    "WARNING",
    "AnchorSettings",
    "Problem",
    "Repaired",
    "Report",
    "check_coco",
    "describe",
    "mend",
    "note_leaks",
    "write_json",
    "write_whole",
]
