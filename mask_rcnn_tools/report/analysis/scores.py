"""Figures of a whole evaluation from its findings: precision, calibration, confusion, images."""

import math
from dataclasses import dataclass

import numpy as np

from mask_rcnn_tools.report.analysis.findings import Findings, Task
from mask_rcnn_tools.report.analysis.matching import CLASS, IGNORED, RIGHT, THRESHOLDS, Array

# COCO's recall levels.
RECALLS = np.linspace(0, 1, 101)
_BINS = 10


def precision_curve(right: Array, total: int) -> Array:
    """COCO's interpolated precision at RECALLS.

    Args:
        right: bool, of the detections that count, best score first.
        total: of objects; where it is 0, precision is 1 if nothing is found, else 0.
    """
    if not total:
        return np.full(len(RECALLS), float(not len(right)))
    hits = np.cumsum(right)
    recall = hits / total
    precision = hits / np.arange(1, len(right) + 1)
    # The best precision at this recall or above.
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    places = np.searchsorted(recall, RECALLS)
    return np.append(precision, 0.0)[np.minimum(places, len(precision))]


def average_precisions(findings: Findings, name: str) -> Array:
    """AP of each class at each IoU threshold, from 0 to 1, nan where a class has no object.

    Args:
        findings: of an evaluation.
        name: "bbox" or "segm".

    Returns:
        (K, T) averages over the recall levels; they are COCO's for all areas.
    """
    return class_curves(findings, name).mean(axis=2)


def class_curves(findings: Findings, name: str) -> Array:
    """(K, T, 101): precision by class, IoU threshold and recall; nan where there is no object."""
    task, detections = findings.tasks[name], findings.detections
    totals = np.bincount(
        findings.truth.category[~findings.truth.crowd], minlength=len(findings.class_names)
    )
    curves = np.full((len(totals), len(THRESHOLDS), len(RECALLS)), np.nan)
    for k in np.flatnonzero(totals):
        own = np.flatnonzero(detections.category == k)
        own = own[np.argsort(-detections.score[own], kind="stable")]
        for t in range(len(THRESHOLDS)):
            right = (task.right[own] >> t) & 1 > 0
            counts = (task.ignored[own] >> t) & 1 == 0
            curves[k, t] = precision_curve(right[counts], int(totals[k]))
    return curves


def mean_curves(curves: Array) -> Array:
    """(T, 101): the mean over the classes that have objects, nan where none has."""
    defined = curves[~np.isnan(curves[:, 0, 0])]
    return defined.mean(axis=0) if len(defined) else np.full(curves.shape[1:], np.nan)


def best_threshold(findings: Findings, name: str) -> tuple[float, float, float, float]:
    """The score above which F1 at IoU 0.5, over all classes together, is highest.

    Returns:
        (score, precision, recall, F1); the score is 0.5 where nothing is right, the precision NaN
        where nothing is found, the recall where nothing is there.
    """
    task, detections = findings.tasks[name], findings.detections
    counts = np.flatnonzero(task.error != IGNORED)
    order = counts[np.argsort(-detections.score[counts], kind="stable")]
    hits = np.cumsum(task.error[order] == RIGHT)
    total = int((~findings.truth.crowd).sum())
    if not len(hits) or not hits[-1] or not total:
        return 0.5, 0.0 if len(hits) else math.nan, 0.0 if total else math.nan, 0.0
    f1 = 2 * hits / (np.arange(1, len(hits) + 1) + total)
    best = int(f1.argmax())
    return (
        float(detections.score[order[best]]),
        float(hits[best] / (best + 1)),
        float(hits[best] / total),
        float(f1[best]),
    )


@dataclass(frozen=True)
class Calibration:
    """How often detections are right, by score.

    Attributes:
        count: (10,) detections by tenths of the score.
        score: (10,) their mean score, nan where there is none.
        right: (10,) the share of them that match an object at IoU 0.5, nan where there is none.
        error: the expected calibration error: the mean distance of the two, weighted by count.
        bias: the mean score less the share that is right, over all: above 0 is overconfident.
    """

    count: Array
    score: Array
    right: Array
    error: float
    bias: float


def calibrate(scores: Array, right: Array) -> Calibration:
    """Compares scores with what became of the detections.

    Args:
        scores: (R,), from 0 to 1.
        right: (R,) bool.
    """
    bins = np.clip((scores * _BINS).astype(int), 0, _BINS - 1)
    count = np.bincount(bins, minlength=_BINS)
    with np.errstate(invalid="ignore"):
        score = np.bincount(bins, scores, _BINS) / count
        share = np.bincount(bins, right.astype(float), _BINS) / count
    filled = count > 0
    distance = np.abs(score - share)[filled] * count[filled]
    whole = max(1, count.sum())
    bias = float(scores.mean() - right.mean()) if len(scores) else math.nan
    return Calibration(count, score, share, float(distance.sum() / whole), bias)


def confusion_matrix(findings: Findings, name: str, threshold: float) -> Array:
    """(K + 1, K + 1) counts: rows what was there, columns what was found, the last of each nothing.

    Args:
        findings: of an evaluation.
        name: "bbox" or "segm".
        threshold: detections that score less do not count.
    """
    task, truth, detections = findings.tasks[name], findings.truth, findings.detections
    kinds = len(findings.class_names)
    matrix = np.zeros((kinds + 1, kinds + 1), np.int64)
    kept = (detections.score >= threshold) & (task.error != IGNORED)
    right = np.flatnonzero(kept & (task.error == RIGHT))
    np.add.at(matrix, (truth.category[task.found[right]], detections.category[right]), 1)
    seen = np.zeros(len(truth), bool)
    seen[task.found[right]] = True
    wrong = np.flatnonzero(kept & (task.error != RIGHT))
    wrong = wrong[np.argsort(-detections.score[wrong], kind="stable")]
    for d in wrong:
        target = task.target[d]
        named = task.error[d] == CLASS and not seen[target]
        row = truth.category[target] if named else kinds
        matrix[row, detections.category[d]] += 1
        if named:
            seen[target] = True
    missed = ~seen & ~truth.crowd
    matrix[:kinds, kinds] = np.bincount(truth.category[missed], minlength=kinds)
    return matrix


def image_quality(findings: Findings, task: Task, threshold: float) -> Array:
    """How well each image came out, from 0 to 1; nan where nothing was there and nothing found.

    The sum of the IoU of what is right (at IoU 0.5), over right + wrong / 2 + missed / 2: the
    panoptic quality (Kirillov et al. 2019) of the image, over all classes together.

    Args:
        findings: of an evaluation.
        task: one of its tasks.
        threshold: detections that score less do not count.
    """
    count = len(findings.images)
    detections, truth = findings.detections, findings.truth
    kept = (detections.score >= threshold) & (task.error != IGNORED)
    right = kept & (task.error == RIGHT)
    overlap = np.bincount(detections.image[right], task.iou[right], count)
    found = np.bincount(detections.image[kept], minlength=count)
    there = np.bincount(truth.image[~truth.crowd], minlength=count)
    with np.errstate(invalid="ignore", divide="ignore"):
        # right + (found - right) / 2 + (there - right) / 2
        return np.where(found + there > 0, overlap / ((found + there) / 2), np.nan)
