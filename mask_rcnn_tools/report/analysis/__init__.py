"""What went right and wrong in an evaluation, detection by detection and object by object."""

from mask_rcnn_tools.report.analysis.error_split import ERRORS, ErrorSplit, split_errors
from mask_rcnn_tools.report.analysis.findings import Findings, Objects, Task, analyse
from mask_rcnn_tools.report.analysis.results_file import read_results
from mask_rcnn_tools.report.analysis.scores import (
    Calibration,
    average_precisions,
    best_threshold,
    calibrate,
    class_curves,
    confusion_matrix,
    image_quality,
    mean_curves,
)

__all__ = [
    "ERRORS",
    "Calibration",
    "ErrorSplit",
    "Findings",
    "Objects",
    "Task",
    "analyse",
    "average_precisions",
    "best_threshold",
    "calibrate",
    "class_curves",
    "confusion_matrix",
    "image_quality",
    "mean_curves",
    "read_results",
    "split_errors",
]
