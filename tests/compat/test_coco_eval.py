"""Compares the C++ evaluator with pycocotools, on random data with every case of the protocol."""

import contextlib
import copy
import io
from typing import Any

import numpy as np
import pycocotools.mask as mask_utils
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from mask_rcnn_plus.compat.coco_eval import COCOeval_opt, CppCOCOeval

SIDE = 160
KEYPOINTS = 17


def _object(center: np.ndarray, radius: float, shape: np.ndarray) -> dict[str, Any]:
    """A polygon around a point, with its mask, box and keypoints; shape (26, 2) in [0, 1]."""
    angles, radii = np.linspace(0, 6, 9), radius * (0.5 + shape[:9, 0] / 2)
    corners = center + radii[:, None] * np.stack([np.cos(angles), np.sin(angles)], 1)
    polygon = [corners.clip(0, SIDE).ravel().tolist()]
    rle = mask_utils.merge(mask_utils.frPyObjects(polygon, SIDE, SIDE))
    keypoints = np.ones((KEYPOINTS, 3))
    keypoints[:, :2] = center + radius * (shape[9:] - 0.5)
    return {
        "bbox": mask_utils.toBbox(rle).tolist(),
        "polygon": polygon,
        "rle": {"size": [SIDE, SIDE], "counts": rle["counts"].decode()},
        "area": float(mask_utils.area(rle)),
        "keypoints": keypoints,
    }


def _place(rng: np.random.Generator) -> tuple[np.ndarray, float, np.ndarray]:
    return rng.uniform(0, SIDE, 2), float(rng.choice([5, 15, 40, 90])), rng.random((26, 2))


def _random_data(seed: int) -> tuple[COCO, list[dict[str, Any]]]:
    """A ground truth, and detections near and far from it.

    There are images without objects, without detections and without both, a category without
    objects, crowds, both notations of a mask, objects on the bounds of the area ranges and without
    a visible keypoint, tied scores, and, for odd seeds, more than 100 detections in an image.
    """
    rng = np.random.default_rng(seed)
    images = [{"id": int(i), "height": SIDE, "width": SIDE} for i in rng.permutation(50)[:8]]
    categories = [{"id": i, "name": str(i)} for i in (3, 7, 12)]
    annotations, detections = [], []
    for index, image in enumerate(images):
        drawn = []
        for _ in range(0 if index % 4 == 0 else 10):
            drawn.append((_place(rng), int(rng.choice([3, 7]))))
            made, visible = _object(*drawn[-1][0]), rng.integers(0, 3, KEYPOINTS)
            made["keypoints"][:, 2] = visible * (rng.random() < 0.8)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image["id"],
                    "category_id": drawn[-1][1],
                    "bbox": made["bbox"],
                    "segmentation": made["polygon" if rng.random() < 0.5 else "rle"],
                    "area": made["area"]
                    if rng.random() < 0.9
                    else float(rng.choice([32, 96]) ** 2),
                    "iscrowd": int(rng.random() < 0.15),
                    "keypoints": made["keypoints"].ravel().tolist(),
                    "num_keypoints": int((made["keypoints"][:, 2] > 0).sum()),
                }
            )
        for _ in range(0 if index % 3 == 2 else 130 if seed % 2 and index == 1 else 25):
            place, category = _place(rng), int(rng.choice([3, 7, 12]))
            if drawn and rng.random() < 0.8:
                (center, radius, shape), category = drawn[rng.integers(len(drawn))]
                place = center + rng.normal(0, radius / 20, 2), radius, shape
            made = _object(*place)
            detections.append(
                {
                    "image_id": image["id"],
                    "category_id": category,
                    "bbox": made["bbox"],
                    "segmentation": made["rle"],
                    "keypoints": made["keypoints"].ravel().tolist(),
                    "score": float(rng.integers(0, 40)) / 40,
                }
            )
    return _coco(images, annotations, categories), detections


def _coco(images: list, annotations: list, categories: list) -> COCO:
    coco = COCO()
    coco.dataset = {"images": images, "annotations": annotations, "categories": categories}
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def _evaluate(evaluator: Any, truth: COCO, detections: list, kind: str, **params: Any) -> Any:
    # loadRes changes its input, and takes a mask's area from the box if there is one.
    results = [{k: v for k, v in d.items() if (kind, k) != ("segm", "bbox")} for d in detections]
    with contextlib.redirect_stdout(io.StringIO()):
        run = evaluator(truth, truth.loadRes(copy.deepcopy(results)), kind)
        for name, value in params.items():
            setattr(run.params, name, value)
        run.evaluate()
        run.accumulate()
        run.summarize()
    return run


@pytest.mark.parametrize("kind", ["bbox", "segm", "keypoints"])
@pytest.mark.parametrize("seed", range(3))
def test_cpp_evaluator_equals_pycocotools(seed: int, kind: str) -> None:
    truth, detections = _random_data(seed)
    half = {"imgIds": truth.getImgIds()[::2]}
    few = {"maxDets": [1, 3, 100]}
    # One ground truth for all runs, as in detectron2: a run must not affect the next.
    for params in ({}, half, few) if kind != "keypoints" else ({}, half):
        ours = _evaluate(COCOeval_opt, truth, detections, kind, **params)
        theirs = _evaluate(COCOeval, copy.deepcopy(truth), detections, kind, **params)
        assert isinstance(ours, CppCOCOeval)
        assert 0 < ours.stats[0] < 1
        np.testing.assert_allclose(
            ours.stats[: len(theirs.stats)], theirs.stats, rtol=0, atol=1e-12
        )
        for part in ("precision", "recall", "scores"):
            assert ours.eval[part].shape == theirs.eval[part].shape  # all 3 categories
            np.testing.assert_allclose(ours.eval[part], theirs.eval[part], rtol=0, atol=1e-12)


def test_perfect_and_missing_detections() -> None:
    box = {"image_id": 1, "category_id": 1, "bbox": [10, 10, 40, 40]}
    far = [
        {**box, "id": i, "bbox": [60 * i, 0, 40, 40], "area": 1600, "iscrowd": 0} for i in (1, 2)
    ]
    truth = _coco([{"id": 1, "height": SIDE, "width": SIDE}], far, [{"id": 1, "name": "a"}])
    found = [{**box, "bbox": [60, 0, 40, 40], "score": 0.5}]
    stats = _evaluate(COCOeval_opt, truth, found, "bbox").stats
    # One of two objects is detected exactly: precision is 1 at 51 of the 101 recalls, 0 to 0.5.
    assert stats[0] == pytest.approx(51 / 101)
    assert stats[8] == pytest.approx(0.5)


@pytest.mark.parametrize("image_id", ["image 1", -1, 2**60])
def test_ids_that_the_cpp_code_cannot_store_use_pycocotools(image_id: Any) -> None:
    box = {"image_id": image_id, "category_id": 1, "bbox": [10, 10, 40, 40]}
    truth = _coco(
        [{"id": image_id, "height": SIDE, "width": SIDE}],
        [{**box, "id": 1, "area": 1600, "iscrowd": 0}],
        [{"id": 1, "name": "a"}],
    )
    assert _evaluate(COCOeval_opt, truth, [{**box, "score": 1.0}], "bbox").stats[
        0
    ] == pytest.approx(1)
