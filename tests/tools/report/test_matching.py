"""Matches equal COCO's; each wrong detection has the error type that TIDE defines."""

import contextlib
import copy
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

import mask_rcnn_plus  # noqa: F401  (makes detectron2 importable)
from mask_rcnn_plus.errors import UserError
from mask_rcnn_tools.report import detections as detections_module
from mask_rcnn_tools.report.detections import read_results
from mask_rcnn_tools.report.matching import (
    BACKGROUND,
    BOTH,
    CLASS,
    DUPLICATE,
    IGNORED,
    LOCATION,
    RIGHT,
    analyse,
    match,
)
from mask_rcnn_tools.report.metrics import class_curves

SIDE = 120


def ellipse(box: Any) -> dict[str, Any]:
    x, y, w, h = box
    rows, columns = np.mgrid[:SIDE, :SIDE] + 0.5
    inside = ((columns - x - w / 2) / (w / 2)) ** 2 + ((rows - y - h / 2) / (h / 2)) ** 2 <= 1
    rle = mask_util.encode(np.asfortranarray(inside.astype(np.uint8)))
    return {"size": rle["size"], "counts": rle["counts"].decode()}


def random_case(seed: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Three classes, one of them rare; crowds, equal scores, stray and duplicate boxes."""
    rng = np.random.default_rng(seed)
    truth: dict[str, Any] = {
        "images": [{"id": i, "height": SIDE, "width": SIDE} for i in (7, 3, 5)],
        "categories": [{"id": k, "name": str(k)} for k in (2, 9, 4)],
        "annotations": [],
    }
    results = []
    for image in (3, 5, 7):
        for _ in range(int(rng.integers(0, 9))):
            box = [*rng.integers(0, 80, 2).tolist(), *rng.integers(8, 40, 2).tolist()]
            kind = int(rng.choice([2, 9, 4], p=[0.6, 0.38, 0.02]))
            annotation = {"image_id": image, "category_id": kind, "bbox": box}
            annotation |= {"id": len(truth["annotations"]) + 1, "area": box[2] * box[3]}
            annotation |= {"iscrowd": int(rng.random() < 0.15), "segmentation": ellipse(box)}
            truth["annotations"].append(annotation)
            for _ in range(int(rng.integers(0, 4))):
                moved = (np.array(box) + rng.normal(0, 3, 4)).clip(4, 100).round().tolist()
                detected = kind if rng.random() < 0.8 else 2
                score = round(float(rng.random()), 1)
                results.append(
                    {
                        "image_id": image,
                        "category_id": detected,
                        "bbox": moved,
                        "score": score,
                        "segmentation": ellipse(moved),
                    }
                )
    return truth, results


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("task", ["bbox", "segm"])
def test_average_precision_equals_cocos(seed: int, task: str) -> None:
    truth, results = random_case(seed)
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = copy.deepcopy(truth)
        coco.createIndex()
        detections = [
            {k: v for k, v in d.items() if task == "bbox" or k != "bbox"}
            for d in copy.deepcopy(results)
        ]
        expected = COCOeval(coco, coco.loadRes(detections), task)
        expected.params.maxDets = [1, 2, 5]
        expected.evaluate()
        expected.accumulate()
    precision = expected.eval["precision"][..., 0, -1]  # T x S x K
    expected_ap = np.where(precision[0, 0] > -1, precision.mean(axis=1), np.nan).T
    actual = class_curves(analyse(truth, results, max_dets=5), task).mean(axis=2)
    np.testing.assert_allclose(actual, expected_ap, atol=1e-12)


def test_each_error_has_the_first_type_that_applies() -> None:
    #   objects: class 0, class 1, and a crowd of class 0
    ious = np.array(
        [
            [0.9, 0.0, 0.0],  # class 0: right
            [0.6, 0.0, 0.0],  # class 0: the object already has a match
            [0.4, 0.7, 0.0],  # class 0: badly placed, although well placed for another class
            [0.0, 0.5, 0.0],  # class 0: well placed, but the object has another class
            [0.0, 0.3, 0.0],  # class 0: near that object
            [0.1, 0.0, 0.0],  # class 2: too far from any object
            [0.0, 0.0, 0.8],  # class 0: in a crowd of its class
            [0.0, 0.0, 0.8],  # class 1: in a crowd of another class, which does not count
        ]
    )
    classes = np.array([0, 0, 0, 0, 0, 2, 0, 1])
    matches = match(ious, classes, np.array([0, 1, 0]), np.array([False, False, True]))
    names = [RIGHT, DUPLICATE, LOCATION, CLASS, BOTH, BACKGROUND, IGNORED, BACKGROUND]
    assert matches.errors.tolist() == names
    assert matches.targets.tolist() == [-1, -1, 0, 1, -1, -1, -1, -1]
    assert matches.objects.tolist() == [0, *[-1] * 7] and matches.ious[0] == 0.9
    assert matches.right[0].tolist() == [True] * 9 + [False]


def test_without_objects_all_errors_are_background() -> None:
    empty = np.zeros(0, int)
    matches = match(np.zeros((2, 0)), np.zeros(2, int), empty, empty.astype(bool))
    assert matches.errors.tolist() == [BACKGROUND, BACKGROUND]
    assert len(match(np.zeros((0, 2)), empty, np.zeros(2, int), np.zeros(2, bool)).errors) == 0


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 1000])
def test_results_are_read_in_chunks(
    tmp_path: Path, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(detections_module, "_CHUNK", chunk)
    path = tmp_path / "results.json"
    entries = [{"score": 1e-05, "name": 'a"],{'}, {}, {"x": [1, [2]], "y": {"z": None}}]
    for text in (json.dumps(entries), json.dumps(entries, indent=2) + "\n"):
        path.write_text(text)
        assert list(read_results(path)) == entries
    path.write_text(" [ ] ")
    assert list(read_results(path)) == []


@pytest.mark.parametrize("text", ["", "{}", "[", '[{"a": 1}', '[{"a": 1', "[1]", '[{"a": nul}]'])
def test_a_malformed_list_of_detections_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"cannot read the detections in .*results\.json"):
        list(read_results(path))
