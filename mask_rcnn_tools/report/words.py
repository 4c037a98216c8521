"""What stands out in an evaluation, in sentences: missing figures, limits, habits of the model."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from mask_rcnn_tools.report.analysis import Calibration, ErrorSplit
from mask_rcnn_tools.report.run import Run

KINDS = {"bbox": "boxes", "segm": "masks", "boundary": "boundaries", "keypoints": "keypoints"}
_SIZES = {
    "s": "small (below 32 x 32 pixels)",
    "m": "medium (from 32 x 32 to 96 x 96 pixels)",
    "l": "large (above 96 x 96 pixels)",
}
_ERRORS = {
    "class": "found in the right place and called another class",
    "location": "of the right class, with an IoU of 0.1 to 0.5",
    "both": "near an object, but of another class and not well placed",
    "duplicate": "a second detection of an object that is found already",
    "background": "where nothing is",
    "missed": "an object that nothing, not even a wrong detection, is about",
}


def explain_errors() -> Mapping[str, str]:
    """What each type of error is."""
    return _ERRORS


def missing_figures(run: Run) -> list[str]:
    """Why an AP is nan, or -1 as pycocotools writes it."""
    truth = run.findings.truth
    counted = ~truth.crowd
    if not counted.any():
        why = "objects, only crowds, which do not count" if truth.crowd.any() else "objects at all"
        return [f"Every AP is nan: the ground truth has no {why}."]
    reasons = []
    tasks = [t for t in KINDS if isinstance(run.figures.get(t), Mapping)]
    for size, words in _SIZES.items():
        if any(_undefined(run.figures[t].get(f"AP{size}")) for t in tasks):
            reasons.append(f"AP{size} is nan: the ground truth has no object that is {words}.")
    present = set(np.unique(truth.category[counted]).tolist())
    absent = [name for k, name in enumerate(run.findings.class_names) if k not in present]
    if absent:
        reasons.append(
            f"AP is nan for {_some(absent)}: the ground truth has no object of "
            f"{'this class' if len(absent) == 1 else 'these classes'}; the mean leaves "
            f"{'it' if len(absent) == 1 else 'them'} out."
        )
    if "segm" in run.figures and "boundary" not in run.figures:
        reasons.append(
            "There is no boundary AP: it was evaluated with TEST.BOUNDARY_AP False, by another "
            "version, or the ids of the data set are no natural numbers."
        )
    if "segm" not in run.findings.tasks:
        reasons.append("There are no masks here, so all is about boxes.")
    return reasons


def detection_limit(run: Run) -> list[str]:
    """Whether TEST.DETECTIONS_PER_IMAGE holds the figures down."""
    if run.limit < 0:
        return []
    findings, limit = run.findings, run.limit
    images = len(findings.images)
    there = np.bincount(findings.truth.image[~findings.truth.crowd], minlength=images)
    found = np.bincount(findings.detections.image, minlength=images)
    reasons = []
    over, total = int((there > limit).sum()), int(there.sum())
    if over:
        best = 100 * float(np.minimum(there, limit).sum()) / total
        reasons.append(
            f"{_images(over)} more than {limit} objects, and TEST.DETECTIONS_PER_IMAGE lets "
            f"{limit} be found: recall ends at {best:.1f} %, and AP is stuck below that. Set it to "
            f"{int(there.max())} or more; evaluation follows it beyond COCO's 100."
        )
    full = int(((found >= limit) & (there <= limit)).sum())
    if full and full >= 0.05 * images and limit < 100:
        reasons.append(
            f"{_images(full)} as many detections as TEST.DETECTIONS_PER_IMAGE allows ({limit}): "
            "what scores less is cut off, and AP may be stuck at that limit. Raise it."
        )
    return reasons


def found_nothing(run: Run) -> list[str]:
    """What it means that there are no detections, or none that is right."""
    if not len(run.findings.detections):
        return [
            "The model found nothing, so AP is 0 wherever there are objects. It may need longer "
            "training, or a lower MODEL.ROI_HEADS.SCORE_THRESH_TEST."
        ]
    task = run.findings.tasks[run.findings.main_task]
    if len(run.findings.truth) and not (task.error == 0).any():
        return ["No detection is right at IoU 0.5. Do the classes and the scale of the data fit?"]
    return []


def habits(split: ErrorSplit, calibrated: Calibration, kind: str) -> list[str]:
    """The largest part of what is missing, and whether scores can be taken at their word."""
    sentences = []
    if not math.isnan(split.ap50) and split.ap50 < 99.95:
        worst = max(split.parts, key=lambda name: split.parts[name])
        sentences.append(
            f"Of the {100 - split.ap50:.1f} that AP50 of {kind} lacks, {split.parts[worst]:.1f} "
            f"are {worst} errors ({_ERRORS[worst]})."
        )
    if abs(calibrated.bias) > 0.05:
        habit = "overconfident" if calibrated.bias > 0 else "underconfident"
        sentences.append(
            f"Scores are {habit}: on average {100 * abs(calibrated.bias):.0f} percentage points "
            f"{'above' if calibrated.bias > 0 else 'below'} the share of detections that is right."
        )
    return sentences


def no_pictures(missing: set[str], full: bool, image_root: Any) -> list[str]:
    """Why some pictures are not there."""
    sentences = []
    if missing:
        sentences.append(
            f"Not shown, because the image is not in {image_root}, cannot be read or has another "
            f"size than the json says: {_some(sorted(missing))}. --image-root names another folder."
        )
    if full:
        sentences.append("Some pictures are left out to keep the page below 20 MB.")
    return sentences


def _undefined(value: Any) -> bool:
    return isinstance(value, int | float) and (math.isnan(value) or value < 0)


def _images(count: int) -> str:
    return "1 image has" if count == 1 else f"{count} images have"


def _some(names: list[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
