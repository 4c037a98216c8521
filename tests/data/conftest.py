"""A temporary data set root, and helpers of the tests of data sets."""

import json
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from mask_rcnn_plus.data import folders
from mask_rcnn_plus.errors import UserError

# Two images; category ids with a gap, out of order; integers, as many tools write them.
_COCO: dict[str, Any] = {
    "images": [
        {"id": 5, "file_name": "b.png", "height": 40, "width": 50},
        {"id": 3, "file_name": "a.png", "height": 30, "width": 20},
    ],
    "annotations": [
        {
            "id": 1,
            "image_id": 5,
            "category_id": 7,
            "bbox": [1, 2, 11, 13],
            "area": 143,
            "iscrowd": 0,
            "segmentation": [[1, 2, 12, 2, 12, 15, 1, 15]],
        },
        {
            "id": 2,
            "image_id": 3,
            "category_id": 2,
            "bbox": [0.5, 0, 3, 4],
            "area": 12,
            "iscrowd": 0,
        },
    ],
    "categories": [{"id": 7, "name": "dog"}, {"id": 2, "name": "cat"}],
}


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty data set root, and catalogs that forget what the test registers."""
    path = tmp_path / "root"
    path.mkdir()
    monkeypatch.setenv("DETECTRON2_DATASETS", str(path))
    catalogs = (DatasetCatalog, MetadataCatalog)
    before = [dict(catalog.data) for catalog in catalogs]
    for name in folders._folders:  # registered by earlier tests
        for catalog in catalogs:
            catalog.data.pop(name, None)
    monkeypatch.setattr(folders, "_folders", {})
    yield path
    for catalog, data in zip(catalogs, before, strict=True):
        catalog.data.clear()
        catalog.data.update(data)


@pytest.fixture
def pets() -> Callable[[], dict[str, Any]]:
    """Creates COCO content that the test may change."""
    return lambda: deepcopy(_COCO)


@pytest.fixture
def write() -> Callable[..., Path]:
    """Writes a json and an empty file for each of its images; returns the json's path."""

    def write(
        root: Path,
        content: Any = _COCO,
        *,
        name: str = "pets",
        split: str = "train",
        at: str = "images",
    ) -> Path:
        json_file = root / name / f"{split}.json"
        images = root / name / at
        images.mkdir(parents=True, exist_ok=True)
        json_file.write_text(content if isinstance(content, str) else json.dumps(content))
        if isinstance(content, dict):
            for image in content.get("images") or []:
                if isinstance(image, dict) and isinstance(image.get("file_name"), str):
                    (images / image["file_name"]).touch()
        return json_file

    return write


@pytest.fixture
def message_of() -> Callable[..., str]:
    """The one-line message of the error that a call raises."""

    def message_of(call: Callable[[], Any]) -> str:
        with pytest.raises(UserError) as caught:
            call()
        message = str(caught.value)
        assert "\n" not in message
        return message

    return message_of
