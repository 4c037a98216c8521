"""COCO's matching on one image, and what is wrong with each detection that matches nothing.

Letters in shapes: D detections of an image, best score first; G objects of it; T IoU thresholds.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

# IoU thresholds of AP; the error types are those at the first.
THRESHOLDS = np.linspace(0.5, 0.95, 10)
_FOREGROUND, _BACKGROUND = 0.5, 0.1

Array = npt.NDArray[Any]

# The error of a detection. RIGHT matches an object; IGNORED lies in a crowd and does not count.
IGNORED, RIGHT, CLASS, LOCATION, BOTH, DUPLICATE, BACKGROUND = -1, 0, 1, 2, 3, 4, 5


@dataclass(frozen=True)
class Matches:
    """What became of the detections of one image.

    Attributes:
        right: (D, T) bool, whether it matches an object at each threshold.
        ignored: (D, T) bool, whether it matches a crowd and counts neither way.
        objects: (D,) the object that it matches at IoU 0.5, or -1.
        ious: (D,) the IoU with it, 0 where there is none.
        errors: (D,) of IGNORED, RIGHT, CLASS, ...
        targets: (D,) for CLASS the object of another class that it overlaps most, for LOCATION of
            its own class; else -1.
    """

    right: Array
    ignored: Array
    objects: Array
    ious: Array
    errors: Array
    targets: Array


def match(ious: Array, classes: Array, object_classes: Array, crowds: Array) -> Matches:
    """Matches as COCO does: by class, best score first, to the free object of the highest IoU.

    The errors are those of TIDE (Bolya et al. 2020, section 2.2), each detection having the first
    that applies: LOCATION, IoU of 0.1 to 0.5 with an object of its class; CLASS, at least 0.5 with
    one of another; DUPLICATE, at least 0.5 with an object of its class that a better score has
    matched; BACKGROUND, at most 0.1 with any object; BOTH, all others.

    Args:
        ious: (D, G), rows by falling score; for a crowd, the share of the detection inside it.
        classes: (D,).
        object_classes: (G,).
        crowds: (G,) bool, which objects stand for many.
    """
    count, kinds = len(classes), len(THRESHOLDS)
    result = Matches(
        right=np.zeros((count, kinds), bool),
        ignored=np.zeros((count, kinds), bool),
        objects=np.full(count, -1, np.int32),
        ious=np.zeros(count),
        errors=np.full(count, BACKGROUND, np.int8),
        targets=np.full(count, -1, np.int32),
    )
    if not count or not len(object_classes):
        return result
    same = classes[:, None] == object_classes[None]
    own = np.where(same & ~crowds, ious, -1.0)
    inside = np.where(same & crowds, ious, -1.0).max(axis=1)
    # COCO takes a hair less than 1 for a threshold of 1; ours end at 0.95.
    free = np.ones((kinds, len(object_classes)), bool)
    for d in np.flatnonzero(own.max(axis=1) >= THRESHOLDS[0]):
        left = np.where(free, own[d], -1.0)
        # Of equals the last, as COCO's.
        best = left.shape[1] - 1 - left[:, ::-1].argmax(axis=1)
        value = left[np.arange(kinds), best]
        hit = value >= THRESHOLDS
        free[hit, best[hit]] = False
        result.right[d] = hit
        if hit[0]:
            result.objects[d], result.ious[d] = best[0], value[0]
    result.ignored[:] = ~result.right & (inside[:, None] >= THRESHOLDS)
    _name_errors(result, ious, same, own, crowds)
    return result


def _name_errors(result: Matches, ious: Array, same: Array, own: Array, crowds: Array) -> None:
    other = np.where(~same & ~crowds, ious, -1.0)
    most_own, most_other = own.max(axis=1), other.max(axis=1)
    most = np.maximum(most_own, most_other)
    errors, targets = result.errors, result.targets
    errors[:] = BOTH
    errors[most <= _BACKGROUND] = BACKGROUND
    errors[most_own >= _FOREGROUND] = DUPLICATE
    wrong_class = most_other >= _FOREGROUND
    misplaced = (most_own >= _BACKGROUND) & (most_own < _FOREGROUND)
    errors[wrong_class] = CLASS
    errors[misplaced] = LOCATION
    errors[result.ignored[:, 0]] = IGNORED
    errors[result.right[:, 0]] = RIGHT
    for error, table in ((CLASS, other), (LOCATION, own)):
        chosen = errors == error
        targets[chosen] = table[chosen].argmax(axis=1)
