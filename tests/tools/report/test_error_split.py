"""The parts of what is missing from AP50, on a case worked out by hand."""

import math
from typing import Any

import numpy as np
import pytest

import mask_rcnn_plus  # noqa: F401  (makes detectron2 importable)
from mask_rcnn_tools.report.analysis import (
    analyse,
    best_threshold,
    calibrate,
    confusion_matrix,
    image_quality,
    split_errors,
)
from tests.tools.report.test_findings import random_case

Place = tuple[str, int]


def case(objects: list[Place], found: list[tuple[str, float, float]], kinds: str) -> Any:
    """Boxes of 10 x 10 on one line: objects (class, x), detections (class, x, score)."""
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
        for k, x, score in found
    ]
    return analyse(truth, results, max_dets=100)


# Six classes; a box moved by 5 has an IoU of 1/3 with the one it was.
OBJECTS = [
    *(("a", 0), ("a", 50)),
    ("b", 100),
    ("c", 150),
    ("d", 200),
    ("e", 250),
    *(("f", 300), ("f", 350)),
]
FOUND = [
    ("a", 0, 0.9),  # right
    ("b", 50, 0.8),  # class error, about the second a
    ("b", 105, 0.7),  # location error, about b
    # nothing is about c: missed
    ("d", 900, 0.9),  # background
    ("d", 200, 0.8),  # right
    ("e", 155, 0.9),  # both: of another class than c, and badly placed
    ("e", 250, 0.8),  # right
    ("f", 300, 0.9),  # right
    ("f", 300, 0.8),  # duplicate
    ("f", 350, 0.7),  # right
]
# Recall of a half reaches 51 of the 101 recall levels.
HALF = 51 / 101


def test_parts_add_up_to_what_ap50_lacks_on_a_case_worked_out_by_hand() -> None:
    split = split_errors(case(OBJECTS, FOUND, "abcdef"), "bbox")
    assert set(split.counts.values()) == {1}
    # a: one of two found. b: two wrong ones. c: none. d, e: the second of two is right.
    # f: precision is 1 up to a half, then 2/3.
    f = HALF + (1 - HALF) * 2 / 3
    assert split.ap50 == pytest.approx(100 * (HALF + 0 + 0 + 0.5 + 0.5 + f) / 6)

    # Class and location errors meet in b. Sums of the APs of a and b:
    none = HALF
    class_mended = 1 + 0  # a finds both, b has a wrong detection left
    location_mended = HALF + 0.5  # in b, the class error at 0.8 stands before the right one at 0.7
    both_mended = 2
    class_part = ((class_mended - none) + (both_mended - location_mended)) / 2
    location_part = ((location_mended - none) + (both_mended - class_mended)) / 2
    expected = {
        "class": class_part,
        "location": location_part,
        "both": 0.5,  # e is 1 without it
        "duplicate": 1 - f,
        "background": 0.5,  # d is 1 without it
        "missed": 1,  # without c's object, there is nothing to find and nothing found
    }
    assert split.parts == pytest.approx({k: 100 * v / 6 for k, v in expected.items()})
    assert sum(split.parts.values()) == pytest.approx(100 - split.ap50, abs=1e-9)
    # TIDE's dAP does not add up.
    alone = {**expected, "class": class_mended - none, "location": location_mended - none}
    assert split.alone == pytest.approx({k: 100 * v / 6 for k, v in alone.items()})
    assert sum(split.alone.values()) < 100 - split.ap50 - 5


def test_of_several_errors_about_an_object_the_best_score_makes_it_right() -> None:
    # The location error at 0.9 mended is right; the one at 0.6 is taken away, not a second hit.
    findings = case([("a", 0), ("a", 50)], [("a", 5, 0.9), ("a", 4, 0.6), ("a", 50, 0.5)], "a")
    split = split_errors(findings, "bbox")
    assert split.counts["location"] == 2
    # Two wrong before the right one: precision 1/3 up to a recall of a half.
    assert split.ap50 == pytest.approx(100 * HALF / 3)
    assert split.alone["location"] == pytest.approx(100 - split.ap50)


def test_an_error_about_an_object_that_is_found_is_taken_away() -> None:
    findings = case([("a", 0), ("b", 50)], [("b", 0, 0.9), ("a", 0, 0.8), ("b", 50, 0.7)], "ab")
    split = split_errors(findings, "bbox")
    assert split.counts["class"] == 1 and split.counts["missed"] == 0
    assert split.parts["class"] == pytest.approx(100 - split.ap50) == pytest.approx(25)


def test_an_object_that_is_found_is_not_found_once_more_by_what_is_mended() -> None:
    findings = case(
        [("a", 0), ("a", 90), ("b", 50)], [("b", 0, 0.9), ("a", 0, 0.8), ("b", 50, 0.7)], "ab"
    )
    split = split_errors(findings, "bbox")
    assert split.ap50 == pytest.approx(100 * (HALF + 0.5) / 2)
    # b is 1 then; of the two a there is still one alone.
    assert split.alone["class"] == pytest.approx(25)


@pytest.mark.parametrize("task", ["bbox", "segm"])
@pytest.mark.parametrize("seed", range(4))
def test_parts_add_up_whatever_there_is(seed: int, task: str) -> None:
    split = split_errors(analyse(*random_case(seed), max_dets=100), task)
    assert sum(split.parts.values()) == pytest.approx(100 - split.ap50, abs=1e-9)


def test_nothing_there_and_nothing_found() -> None:
    assert math.isnan(split_errors(case([], [("a", 0, 0.9)], "a"), "bbox").ap50)
    split = split_errors(case([("a", 0)], [], "a"), "bbox")
    assert (split.ap50, split.parts["missed"]) == pytest.approx((0, 100))


def test_the_threshold_is_where_f1_is_highest() -> None:
    findings = case(OBJECTS, FOUND, "abcdef")
    # 0.7: 5 of 10 are right and 8 there: F1 10/18. 0.8: 4 of 8: 8/16. 0.9: 2 of 4: 4/12.
    score, precision, recall, f1 = best_threshold(findings, "bbox")
    assert (score, precision, recall, f1) == pytest.approx((0.7, 5 / 10, 5 / 8, 10 / 18))
    score, precision, recall, f1 = best_threshold(case([("a", 0)], [], "a"), "bbox")
    assert (score, recall, f1) == (0.5, 0.0, 0.0) and math.isnan(precision)
    score, precision, recall, f1 = best_threshold(case([], [("a", 0, 0.9)], "a"), "bbox")
    assert (score, precision, f1) == (0.5, 0.0, 0.0) and math.isnan(recall)


def test_confusion_counts_each_object_and_each_detection_once() -> None:
    matrix = confusion_matrix(case(OBJECTS, FOUND, "abcdef"), "bbox", 0.75)
    expected = np.zeros((7, 7), int)
    expected[0, 0] = expected[3, 3] = expected[4, 4] = expected[5, 5] = 1
    expected[0, 1] = 1  # an a was called b
    expected[6, 3] = expected[6, 4] = expected[6, 5] = 1  # d and e of nothing, f twice
    expected[1, 6] = expected[2, 6] = expected[5, 6] = 1  # b, c and an f (score 0.7) were missed
    assert matrix.tolist() == expected.tolist()


def test_quality_is_panoptic_quality() -> None:
    findings = case(OBJECTS, FOUND, "abcdef")
    # At 0.75: 4 right with IoU 1, 4 wrong, 4 missed.
    quality = image_quality(findings, findings.tasks["bbox"], 0.75)
    assert quality == pytest.approx([4 / (4 + 4 / 2 + 4 / 2)])
    empty = case([], [], "a")
    assert np.isnan(image_quality(empty, empty.tasks["bbox"], 0.5)).all()


def test_calibration_by_hand() -> None:
    scores = np.array([0.95, 0.91, 0.99, 0.15, 0.0, 1.0])
    right = np.array([True, False, True, False, False, True])
    result = calibrate(scores, right)
    assert result.count.tolist() == [1, 1, 0, 0, 0, 0, 0, 0, 0, 4]
    assert result.right[[0, 1, 9]] == pytest.approx([0, 0, 0.75])
    mean = (0.95 + 0.91 + 0.99 + 1) / 4
    assert result.error == pytest.approx(((mean - 0.75) * 4 + 0.15 + 0) / 6)
    assert result.bias == pytest.approx((0.95 + 0.91 + 0.99 + 0.15 + 1 - 3) / 6)
