"""Runs on disk as an evaluation writes them, made without a model."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from mask_rcnn_plus.evaluation.coco_json import segmentation_to_rle

HOSTILE = "<script>alert(1)</script>\"'&{{ 7*7 }}$\\frac"
SIDE = 64


def polygon(box: list[float]) -> list[list[float]]:
    x, y, w, h = box
    return [[x, y, x + w, y, x + w, y + h, x, y + h]]


def rle(box: list[float]) -> dict[str, Any]:
    encoded = segmentation_to_rle(polygon(box), SIDE, SIDE)
    return {"size": list(encoded["size"]), "counts": encoded["counts"].decode()}


MakeRun = Callable[..., Path]


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """Writes a data set and a run on it, from detections (image, class, box, score)."""

    def make(
        name: str,
        detections: list[tuple[int, int, list[float], float]],
        *,
        objects: list[tuple[int, int, list[float]]],
        classes: tuple[str, ...] = ("one", HOSTILE),
        files: tuple[str, ...] = ("a.png", "b.png"),
        limit: int = 100,
        **facts: Any,
    ) -> Path:
        images = tmp_path / "images"
        images.mkdir(exist_ok=True)
        for i, file in enumerate(files):
            if "/" not in file:
                picture = np.full((SIDE, SIDE, 3), (60 + 80 * i) % 256, np.uint8)
                cv2.imencode(".png", picture)[1].tofile(images / file)
        truth = {
            "images": [
                {"id": i, "file_name": file, "height": SIDE, "width": SIDE}
                for i, file in enumerate(files, 1)
            ],
            "categories": [{"id": k, "name": name} for k, name in enumerate(classes, 1)],
            "annotations": [
                {
                    "id": i,
                    "image_id": image,
                    "category_id": kind,
                    "bbox": box,
                    "area": box[2] * box[3],
                    "iscrowd": 0,
                    "segmentation": polygon(box),
                }
                for i, (image, kind, box) in enumerate(objects, 1)
            ],
        }
        json_file = tmp_path / f"{facts.pop('ground_truth', 'val')}.json"
        json_file.write_text(json.dumps(truth))
        run = tmp_path / name
        folder = run / "inference" / "mine_val"
        folder.mkdir(parents=True)
        results = [
            {
                "image_id": image,
                "category_id": kind,
                "bbox": box,
                "score": score,
                "segmentation": rle(box),
            }
            for image, kind, box, score in detections
        ]
        (folder / "coco_instances_results.json").write_text(json.dumps(results))
        evaluation = {
            "data_set": "mine_val",
            "json_file": str(json_file),
            "image_root": str(images),
            "detections_per_image": limit,
            "config": f"OUTPUT_DIR: {json.dumps(HOSTILE)}\nSEED: {len(detections)}\n",
            **facts,
        }
        (folder / "evaluation.json").write_text(json.dumps(evaluation))
        return run

    return make
