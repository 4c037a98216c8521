"""Error types, thresholds, calibration and confusion, on a case calculated by hand."""

import math
from typing import Any

import numpy as np
import pytest

import mask_rcnn_plus  # noqa: F401  (makes detectron2 importable)
from mask_rcnn_tools.report.matching import analyse
from mask_rcnn_tools.report.metrics import (
    best_threshold,
    calibrate,
    confusion_matrix,
    image_quality,
    split_errors,
)
from tests.tools.report.test_matching import random_case


def case(
    objects: list[tuple[str, int]], detections: list[tuple[str, float, float]], kinds: str
) -> Any:
    """Boxes of 10 x 10 in a row: objects (class, x), detections (class, x, score)."""
    truth = {
        "images": [{"id": 1, "height": 20, "width": 1000}],
        "categories": [{"id": i, "name": k} for i, k in enumerate(kinds)],
        "annotations": [
            {"id": i, "image_id": 1, "category_id": kinds.index(k), "bbox": [x, 0, 10, 10]}
            for i, (k, x) in enumerate(objects, 1)
        ],
    }
    results = [
        {"image_id": 1, "category_id": kinds.index(k), "bbox": [x, 0, 10, 10], "score": score}
        for k, x, score in detections
    ]
    return analyse(truth, results, max_dets=100)


# Six classes. A box and its copy moved by 5 have an IoU of 1/3.
OBJECTS = [
    *(("a", 0), ("a", 50)),
    ("b", 100),
    ("c", 150),
    ("d", 200),
    ("e", 250),
    *(("f", 300), ("f", 350)),
]
DETECTIONS = [
    ("a", 0, 0.9),  # right
    ("b", 50, 0.8),  # class error, at the second a
    ("b", 105, 0.7),  # location error, near b
    # no detection near c: missed
    ("d", 900, 0.9),  # background
    ("d", 200, 0.8),  # right
    ("e", 155, 0.9),  # both: another class than c, and badly placed
    ("e", 250, 0.8),  # right
    ("f", 300, 0.9),  # right
    ("f", 300, 0.8),  # duplicate
    ("f", 350, 0.7),  # right
]
# A recall of a half reaches 51 of the 101 recall levels.
HALF = 51 / 101


def test_parts_add_up_to_100_minus_ap50_in_a_case_calculated_by_hand() -> None:
    split = split_errors(case(OBJECTS, DETECTIONS, "abcdef"), "bbox")
    assert set(split.counts.values()) == {1}
    # a: one of two is found. b: two wrong detections. c: no detection. d, e: the second of two
    # detections is right. f: precision is 1 up to a half, then 2/3.
    f = HALF + (1 - HALF) * 2 / 3
    assert split.ap50 == pytest.approx(100 * (HALF + 0 + 0 + 0.5 + 0.5 + f) / 6)

    # Class and location errors meet in b. Sums of the APs of a and b:
    unfixed = HALF
    class_fixed = 1 + 0  # both a are found, b still has a wrong detection
    location_fixed = HALF + 0.5  # b: the class error has a higher score than the right detection
    both_fixed = 2
    class_part = ((class_fixed - unfixed) + (both_fixed - location_fixed)) / 2
    location_part = ((location_fixed - unfixed) + (both_fixed - class_fixed)) / 2
    expected = {
        "class": class_part,
        "location": location_part,
        "both": 0.5,  # e is 1 without it
        "duplicate": 1 - f,
        "background": 0.5,  # d is 1 without it
        "missed": 1,  # without its object, c has no objects and no detections
    }
    assert split.parts == pytest.approx({k: 100 * v / 6 for k, v in expected.items()})
    assert sum(split.parts.values()) == pytest.approx(100 - split.ap50, abs=1e-9)
    # The dAP of TIDE do not add up.
    gains = {
        **expected,
        "class": class_fixed - unfixed,
        "location": location_fixed - unfixed,
    }
    assert split.gains == pytest.approx({k: 100 * v / 6 for k, v in gains.items()})
    assert sum(split.gains.values()) < 100 - split.ap50 - 5


def test_fixing_several_errors_of_an_object_makes_the_best_score_right() -> None:
    # Fixed, the location error at 0.9 is right; the one at 0.6 is removed, not a second hit.
    analysis = case([("a", 0), ("a", 50)], [("a", 5, 0.9), ("a", 4, 0.6), ("a", 50, 0.5)], "a")
    split = split_errors(analysis, "bbox")
    assert split.counts["location"] == 2
    # Two wrong detections, then a right one: precision 1/3 up to a recall of a half.
    assert split.ap50 == pytest.approx(100 * HALF / 3)
    assert split.gains["location"] == pytest.approx(100 - split.ap50)


def test_fixing_an_error_at_a_matched_object_removes_the_detection() -> None:
    analysis = case([("a", 0), ("b", 50)], [("b", 0, 0.9), ("a", 0, 0.8), ("b", 50, 0.7)], "ab")
    split = split_errors(analysis, "bbox")
    assert split.counts["class"] == 1 and split.counts["missed"] == 0
    assert split.parts["class"] == pytest.approx(100 - split.ap50) == pytest.approx(25)


def test_fixing_an_error_at_a_matched_object_adds_no_second_match() -> None:
    analysis = case(
        [("a", 0), ("a", 90), ("b", 50)], [("b", 0, 0.9), ("a", 0, 0.8), ("b", 50, 0.7)], "ab"
    )
    split = split_errors(analysis, "bbox")
    assert split.ap50 == pytest.approx(100 * (HALF + 0.5) / 2)
    # The AP of b is then 1; still only one a is found.
    assert split.gains["class"] == pytest.approx(25)


@pytest.mark.parametrize("task", ["bbox", "segm"])
@pytest.mark.parametrize("seed", range(4))
def test_parts_add_up_for_random_cases(seed: int, task: str) -> None:
    split = split_errors(analyse(*random_case(seed), max_dets=100), task)
    assert sum(split.parts.values()) == pytest.approx(100 - split.ap50, abs=1e-9)


def test_no_objects_and_no_detections() -> None:
    assert math.isnan(split_errors(case([], [("a", 0, 0.9)], "a"), "bbox").ap50)
    split = split_errors(case([("a", 0)], [], "a"), "bbox")
    assert (split.ap50, split.parts["missed"]) == pytest.approx((0, 100))


def test_best_threshold_has_the_highest_f1() -> None:
    analysis = case(OBJECTS, DETECTIONS, "abcdef")
    # 8 objects. At 0.7, 5 of 10 detections are right: F1 10/18. At 0.8, 4 of 8: 8/16. At 0.9, 2 of
    # 4: 4/12.
    score, precision, recall, f1 = best_threshold(analysis, "bbox")
    assert (score, precision, recall, f1) == pytest.approx((0.7, 5 / 10, 5 / 8, 10 / 18))
    score, precision, recall, f1 = best_threshold(case([("a", 0)], [], "a"), "bbox")
    assert (score, recall, f1) == (0.5, 0.0, 0.0) and math.isnan(precision)
    score, precision, recall, f1 = best_threshold(case([], [("a", 0, 0.9)], "a"), "bbox")
    assert (score, precision, f1) == (0.5, 0.0, 0.0) and math.isnan(recall)


def test_confusion_counts_each_object_and_each_detection_once() -> None:
    matrix = confusion_matrix(case(OBJECTS, DETECTIONS, "abcdef"), "bbox", 0.75)
    expected = np.zeros((7, 7), int)
    expected[0, 0] = expected[3, 3] = expected[4, 4] = expected[5, 5] = 1
    expected[0, 1] = 1  # an a detected as b
    expected[6, 3] = expected[6, 4] = expected[6, 5] = 1  # background d, e at c, f twice
    expected[1, 6] = expected[2, 6] = expected[5, 6] = 1  # b, c and an f (score 0.7) are missed
    assert matrix.tolist() == expected.tolist()


def test_image_quality_is_panoptic_quality() -> None:
    analysis = case(OBJECTS, DETECTIONS, "abcdef")
    # At 0.75: 4 right with IoU 1, 4 wrong, 4 missed.
    quality = image_quality(analysis, "bbox", 0.75)
    assert quality == pytest.approx([4 / (4 + 4 / 2 + 4 / 2)])
    empty = case([], [], "a")
    assert np.isnan(image_quality(empty, "bbox", 0.5)).all()


def test_calibration_calculated_by_hand() -> None:
    scores = np.array([0.95, 0.91, 0.99, 0.15, 0.0, 1.0])
    right = np.array([True, False, True, False, False, True])
    result = calibrate(scores, right)
    assert result.count.tolist() == [1, 1, 0, 0, 0, 0, 0, 0, 0, 4]
    assert result.right[[0, 1, 9]] == pytest.approx([0, 0, 0.75])
    mean = (0.95 + 0.91 + 0.99 + 1) / 4
    assert result.error == pytest.approx(((mean - 0.75) * 4 + 0.15 + 0) / 6)
    assert result.bias == pytest.approx((0.95 + 0.91 + 0.99 + 0.15 + 1 - 3) / 6)
