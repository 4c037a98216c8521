"""Why AP50 is not 100: TIDE's error types (Bolya et al. 2020), as parts that add up.

TIDE's own figure for a type, dAP, is what AP50 gains when the errors of that type alone are
mended; those figures do not add up to what is missing, for errors hide each other. The parts here
do: each type's part is its gain averaged over all orders in which the types can be mended one after
the other (its Shapley value). All mended, AP50 is 100, hence the parts add up to 100 - AP50.
"""

from dataclasses import dataclass
from itertools import combinations
from math import factorial

import numpy as np

from mask_rcnn_tools.report.analysis.findings import Findings
from mask_rcnn_tools.report.analysis.matching import (
    BACKGROUND,
    BOTH,
    CLASS,
    DUPLICATE,
    IGNORED,
    LOCATION,
    RIGHT,
)
from mask_rcnn_tools.report.analysis.scores import precision_curve

_MISSED = 6
# What each type is called, in TIDE's order.
ERRORS = {
    "class": CLASS,
    "location": LOCATION,
    "both": BOTH,
    "duplicate": DUPLICATE,
    "background": BACKGROUND,
    "missed": _MISSED,
}


@dataclass(frozen=True)
class ErrorSplit:
    """The errors of an evaluation; figures from 0 to 100, by the names of ERRORS.

    Attributes:
        ap50: the AP at IoU 0.5, mean over the classes that have objects; nan without any.
        parts: what each type takes from AP50; they add up to 100 - ap50.
        alone: what AP50 gains if that type alone is mended: TIDE's dAP.
        counts: how many there are: detections, or for "missed" objects.
    """

    ap50: float
    parts: dict[str, float]
    alone: dict[str, float]
    counts: dict[str, int]


def split_errors(findings: Findings, name: str) -> ErrorSplit:
    """Explains what is missing from AP50.

    Mending a class or location error makes the detection right: of several for one object the best
    score, and none where the object is found already; the others are taken away, as are errors of
    both, duplicates and background. Mending a missed object, which no right detection and no class
    or location error is about, takes it off the ground truth. Where that leaves a class without
    objects, its AP is 100 if nothing is found, else 0.

    Args:
        findings: of an evaluation.
        name: "bbox" or "segm".
    """
    oracle = _Oracle(findings, name)
    counts = {
        kind: int(oracle.missed.sum()) if code == _MISSED else int((oracle.error == code).sum())
        for kind, code in ERRORS.items()
    }
    if not oracle.totals.any():
        nothing = dict.fromkeys(ERRORS, float("nan"))
        return ErrorSplit(float("nan"), nothing, nothing, counts)
    codes = list(ERRORS.values())
    ap = {
        frozenset(mended): 100 * oracle.ap50(mended)
        for size in range(len(codes) + 1)
        for mended in combinations(codes, size)
    }
    before = ap[frozenset()]
    parts = {}
    for kind, code in ERRORS.items():
        parts[kind] = 0.0
        for mended, value in ap.items():
            if code in mended:
                size = len(mended) - 1
                orders = factorial(size) * factorial(len(codes) - size - 1)
                gain = value - ap[mended - {code}]
                parts[kind] += gain * orders / factorial(len(codes))
    alone = {kind: ap[frozenset({code})] - before for kind, code in ERRORS.items()}
    return ErrorSplit(before, parts, alone, counts)


class _Oracle:
    """AP50 after some types of error have been mended."""

    def __init__(self, findings: Findings, name: str) -> None:
        task, truth, detections = findings.tasks[name], findings.truth, findings.detections
        counts = np.flatnonzero(task.error != IGNORED)
        order = counts[np.argsort(-detections.score[counts], kind="stable")]
        self.error = task.error[order]
        self._category = detections.category[order]
        self._target = task.target[order]
        self._truth_category = truth.category
        unfound = (task.found_by < 0) & ~truth.crowd
        self._unfound = unfound
        wanted = np.isin(self.error, (CLASS, LOCATION))
        about = np.zeros(len(truth), bool)
        about[self._target[wanted]] = True
        self.missed = unfound & ~about
        kinds = len(findings.class_names)
        self.totals = np.bincount(truth.category[~truth.crowd], minlength=kinds)
        self._missed_totals = np.bincount(truth.category[self.missed], minlength=kinds)

    def ap50(self, mended: tuple[int, ...]) -> float:
        """From 0 to 1, with the errors of these types mended."""
        kept = ~np.isin(self.error, mended)
        right = self.error == RIGHT
        category = self._category.copy()
        # Detections are by falling score: the first about an object is the best.
        about = np.flatnonzero(np.isin(self.error, [c for c in mended if c in (CLASS, LOCATION)]))
        about = about[self._unfound[self._target[about]]]
        targets, first = np.unique(self._target[about], return_index=True)
        winners = about[first]
        kept[winners] = right[winners] = True
        category[winners] = self._truth_category[targets]
        totals = self.totals - (self._missed_totals if _MISSED in mended else 0)
        order = np.argsort(category[kept], kind="stable")
        sorted_right, sorted_category = right[kept][order], category[kept][order]
        classes = np.flatnonzero(self.totals)
        starts = np.searchsorted(sorted_category, classes)
        stops = np.searchsorted(sorted_category, classes, side="right")
        return float(
            np.mean(
                [
                    precision_curve(sorted_right[start:stop], int(totals[k])).mean()
                    for k, start, stop in zip(classes, starts, stops, strict=True)
                ]
            )
        )
