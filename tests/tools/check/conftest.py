"""A small valid data set, which each test damages in one place."""

import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mask_rcnn_tools.check.checking import check_coco
from mask_rcnn_tools.check.result import CheckResult

# The check finds nothing in it, not even a note.
VALID: dict[str, Any] = {
    "images": [
        {"id": 5, "file_name": "a.png", "height": 40, "width": 50},
        {"id": 6, "file_name": "sub/b.png", "height": 30, "width": 20},
    ],
    "annotations": [
        {
            "id": 1,
            "image_id": 5,
            "category_id": 1,
            "bbox": [2, 3, 20, 10],
            "area": 200,
            "iscrowd": 0,
            "segmentation": [[2, 3, 22, 3, 22, 13, 2, 13]],
        },
        {
            "id": 2,
            "image_id": 5,
            "category_id": 2,
            "bbox": [30.5, 20, 10, 10],
            "area": 100,
            "iscrowd": 0,
            "segmentation": [[30.5, 20, 40.5, 20, 40.5, 30, 30.5, 30]],
        },
        {
            "id": 3,
            "image_id": 6,
            "category_id": 2,
            "bbox": [1, 2, 10, 20],
            "area": 200,
            "iscrowd": 0,
            "segmentation": [[1, 2, 11, 2, 11, 22, 1, 22]],
        },
    ],
    "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
}


@pytest.fixture
def valid() -> dict[str, Any]:
    """A copy of the valid content, which the test may change."""
    return deepcopy(VALID)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The data set folder, with the images and without a json; the test has its own cache."""
    monkeypatch.setenv("MASK_RCNN_PLUS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "root" / "pets"
    (folder / "images" / "sub").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for image in VALID["images"]:
        pixels = rng.integers(0, 255, (image["height"], image["width"], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / image["file_name"])
    return folder


@pytest.fixture
def write(folder: Path) -> Callable[[Any], Path]:
    """Writes the json of the data set pets_train."""

    def write(content: Any) -> Path:
        path = folder / "train.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return write


@pytest.fixture
def check(folder: Path, write: Callable[[Any], Path]) -> Callable[..., CheckResult]:
    """Writes a content as the json and checks it."""

    def check(content: Any, **options: Any) -> CheckResult:
        return check_coco(write(content), folder / "images", name="pets_train", **options)

    return check
