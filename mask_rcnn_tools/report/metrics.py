"""Metrics of a whole evaluation: precision, thresholds, calibration, confusion, errors, images."""

import math
from collections.abc import Collection
from dataclasses import dataclass
from itertools import combinations
from math import factorial

import numpy as np

from mask_rcnn_tools.report.matching import (
    BACKGROUND,
    BOTH,
    CLASS,
    DUPLICATE,
    IGNORED,
    LOCATION,
    RIGHT,
    THRESHOLDS,
    Analysis,
    Array,
)

_RECALLS = np.linspace(0, 1, 101)  # COCO's recall levels
_BINS = 10
_MISSED = 6
# TIDE's error types, in its order. "missed" is an error of an object, the others of a detection.
ERRORS = {
    "class": CLASS,
    "location": LOCATION,
    "both": BOTH,
    "duplicate": DUPLICATE,
    "background": BACKGROUND,
    "missed": _MISSED,
}


def precision_curve(right: Array, total: int) -> Array:
    """COCO's interpolated precision at its 101 recall levels.

    Args:
        right: bool, of the detections that count, best score first.
        total: the number of objects. If it is 0, precision is 1 without detections, else 0.
    """
    if not total:
        return np.full(len(_RECALLS), float(not len(right)))
    hits = np.cumsum(right)
    recall = hits / total
    precision = hits / np.arange(1, len(right) + 1)
    # The best precision at this recall or above.
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    index = np.searchsorted(recall, _RECALLS)
    return np.append(precision, 0.0)[np.minimum(index, len(precision))]


def class_curves(analysis: Analysis, task: str) -> Array:
    """(K, T, 101): precision by class, IoU threshold and recall; nan for classes without objects.

    Their means over the recall levels are COCO's AP for all areas, from 0 to 1.
    """
    matches, detections = analysis.tasks[task], analysis.detections
    totals = _objects_per_class(analysis)
    curves = np.full((len(totals), len(THRESHOLDS), len(_RECALLS)), np.nan)
    for k in np.flatnonzero(totals):
        own = by_score(analysis, detections.category == k)
        for t in range(len(THRESHOLDS)):
            counted = own[~matches.ignored[own, t]]
            curves[k, t] = precision_curve(matches.right[counted, t], int(totals[k]))
    return curves


def mean_curves(curves: Array) -> Array:
    """(T, 101): the mean over the classes that have objects; nan without objects."""
    defined = curves[~np.isnan(curves[:, 0, 0])]
    return defined.mean(axis=0) if len(defined) else np.full(curves.shape[1:], np.nan)


def best_threshold(analysis: Analysis, task: str) -> tuple[float, float, float, float]:
    """The score threshold with the highest F1 at IoU 0.5, over all classes together.

    Returns:
        (score, precision, recall, F1). The score is 0.5 if no detection is right. The precision is
        nan without detections, and the recall is nan without objects.
    """
    errors, scores = analysis.tasks[task].errors, analysis.detections.score
    order = by_score(analysis, errors != IGNORED)
    hits = np.cumsum(errors[order] == RIGHT)
    total = int((~analysis.truth.crowd).sum())
    if not len(hits) or not hits[-1] or not total:
        return 0.5, 0.0 if len(hits) else math.nan, 0.0 if total else math.nan, 0.0
    f1 = 2 * hits / (np.arange(1, len(hits) + 1) + total)
    best = int(f1.argmax())
    precision, recall = hits[best] / (best + 1), hits[best] / total
    return float(scores[order[best]]), float(precision), float(recall), float(f1[best])


@dataclass(frozen=True)
class Calibration:
    """The share of correct detections in each tenth of the score."""

    count: Array  # (10,) detections
    score: Array  # (10,) their mean score; nan without detections
    right: Array  # (10,) the share that matches an object at IoU 0.5; nan without detections
    error: float  # expected calibration error: mean of |score - right|, weighted by count
    bias: float  # overall mean score minus share of right detections; above 0 is overconfident


def calibrate(scores: Array, right: Array) -> Calibration:
    """Compares scores (R,), from 0 to 1, with which detections are right, (R,) bool."""
    bins = np.clip((scores * _BINS).astype(int), 0, _BINS - 1)
    count = np.bincount(bins, minlength=_BINS)
    with np.errstate(invalid="ignore"):
        score = np.bincount(bins, scores, _BINS) / count
        share = np.bincount(bins, right.astype(float), _BINS) / count
    filled = count > 0
    distance = np.abs(score - share)[filled] * count[filled]
    bias = float(scores.mean() - right.mean()) if len(scores) else math.nan
    return Calibration(count, score, share, float(distance.sum() / max(1, count.sum())), bias)


def confusion_matrix(analysis: Analysis, task: str, threshold: float) -> Array:
    """(K + 1, K + 1) counts: rows are true classes, columns detected ones; the last is "nothing".

    Detections below the score threshold do not count.
    """
    matches, truth, detections = analysis.tasks[task], analysis.truth, analysis.detections
    nothing = len(analysis.class_names)
    matrix = np.zeros((nothing + 1, nothing + 1), np.int64)
    seen = np.zeros(len(truth), bool)
    kept = (detections.score >= threshold) & (matches.errors != IGNORED)
    right = np.flatnonzero(kept & (matches.errors == RIGHT))
    np.add.at(matrix, (truth.category[matches.objects[right]], detections.category[right]), 1)
    seen[matches.objects[right]] = True
    for d in by_score(analysis, kept & (matches.errors != RIGHT)):
        target = matches.targets[d]
        confused = matches.errors[d] == CLASS and not seen[target]
        row = truth.category[target] if confused else nothing
        matrix[row, detections.category[d]] += 1
        if confused:
            seen[target] = True
    missed = ~seen & ~truth.crowd
    matrix[:nothing, nothing] = np.bincount(truth.category[missed], minlength=nothing)
    return matrix


def image_quality(analysis: Analysis, task: str, threshold: float) -> Array:
    """The panoptic quality of each image (Kirillov et al. 2019), over all classes together.

    This is the sum of the IoUs of right detections (at IoU 0.5), divided by
    right + wrong / 2 + missed / 2: from 0 to 1; nan without objects and detections. Detections
    below the score threshold do not count.
    """
    count, matches, detections = len(analysis.images), analysis.tasks[task], analysis.detections
    kept = (detections.score >= threshold) & (matches.errors != IGNORED)
    right = kept & (matches.errors == RIGHT)
    overlap = np.bincount(detections.image[right], matches.ious[right], count)
    # right + wrong / 2 + missed / 2 is the mean of the numbers of detections and objects.
    both = np.bincount(detections.image[kept], minlength=count) + analysis.truth.per_image(count)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(both > 0, overlap / (both / 2), np.nan)


@dataclass(frozen=True)
class ErrorSplit:
    """The errors that keep AP50 below 100; metrics from 0 to 100, by the names of ERRORS."""

    ap50: float  # the mean over classes that have objects; nan without objects
    parts: dict[str, float]  # how much AP50 each type costs; they add up to 100 - ap50
    gains: dict[str, float]  # TIDE's dAP: the gain in AP50 if only this type is fixed
    counts: dict[str, int]  # the number of errors: of detections, or for "missed" of objects


def split_errors(analysis: Analysis, task: str) -> ErrorSplit:
    """Attributes the difference of 100 and AP50 to TIDE's error types (Bolya et al. 2020).

    TIDE's dAP of the types do not add up, because errors hide each other. The parts here do: the
    part of a type is its gain averaged over all orders of fixing the types one after the other (its
    Shapley value). With all types fixed, AP50 is 100, so the parts add up to 100 - AP50.

    Fixing class or location errors makes the best-scored detection of each object right, unless the
    object already has a match, and removes the other detections with these errors. Fixing the
    errors "both", "duplicate" and "background" removes the detections. Fixing a missed object, one
    without a right detection, class error or location error, removes it from the ground truth. If
    this leaves a class without objects, its AP is 100 without detections, else 0.
    """
    matches, truth = analysis.tasks[task], analysis.truth
    order = by_score(analysis, matches.errors != IGNORED)
    errors, targets = matches.errors[order], matches.targets[order]
    detected = analysis.detections.category[order]
    unmatched = (matches.matched_by < 0) & ~truth.crowd
    missed = unmatched.copy()
    missed[targets[np.isin(errors, (CLASS, LOCATION))]] = False
    totals = _objects_per_class(analysis)
    classes = np.flatnonzero(totals)
    counts = {name: int((errors == code).sum()) for name, code in ERRORS.items()}
    counts["missed"] = int(missed.sum())
    if not len(classes):
        nothing = dict.fromkeys(ERRORS, math.nan)
        return ErrorSplit(math.nan, nothing, nothing, counts)

    def ap50(fixed: Collection[int]) -> float:
        """AP50, from 0 to 100, with the errors of these types fixed."""
        kept, right, category = ~np.isin(errors, list(fixed)), errors == RIGHT, detected.copy()
        # Detections are by falling score, so the first of an object is the best.
        movable = np.flatnonzero(np.isin(errors, [c for c in fixed if c in (CLASS, LOCATION)]))
        movable = movable[unmatched[targets[movable]]]
        moved_to, first = np.unique(targets[movable], return_index=True)
        moved = movable[first]
        kept[moved] = right[moved] = True
        category[moved] = truth.category[moved_to]
        objects = totals
        if _MISSED in fixed:
            objects = totals - np.bincount(truth.category[missed], minlength=len(totals))
        right, category = right[kept], category[kept]
        by_class = np.argsort(category, kind="stable")
        right, category = right[by_class], category[by_class]
        starts = np.searchsorted(category, classes)
        stops = np.searchsorted(category, classes, side="right")
        curves = [
            precision_curve(right[start:stop], int(objects[k]))
            for k, start, stop in zip(classes, starts, stops, strict=True)
        ]
        return 100 * float(np.mean([curve.mean() for curve in curves]))

    codes = list(ERRORS.values())
    ap = {
        frozenset(fixed): ap50(fixed)
        for size in range(len(codes) + 1)
        for fixed in combinations(codes, size)
    }
    parts = {}
    for name, code in ERRORS.items():
        parts[name] = 0.0
        for fixed, value in ap.items():
            if code in fixed:
                size = len(fixed) - 1
                orders = factorial(size) * factorial(len(codes) - size - 1)
                parts[name] += (value - ap[fixed - {code}]) * orders / factorial(len(codes))
    before = ap[frozenset()]
    gains = {name: ap[frozenset({code})] - before for name, code in ERRORS.items()}
    return ErrorSplit(before, parts, gains, counts)


def _objects_per_class(analysis: Analysis) -> Array:
    truth = analysis.truth
    return np.bincount(truth.category[~truth.crowd], minlength=len(analysis.class_names))


def by_score(analysis: Analysis, chosen: Array) -> Array:
    """The indices of the chosen detections, best score first."""
    indices = np.flatnonzero(chosen)
    return indices[np.argsort(-analysis.detections.score[indices], kind="stable")]
