"""Writes test images, and the json of converted labels."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mask_rcnn_tools.convert.labels import Labels
from mask_rcnn_tools.convert.writing import Plan, write_coco

Save = Callable[..., Path]


@pytest.fixture
def save(tmp_path: Path) -> Save:
    """Saves an image of noise in the test's folder; width and height are those before EXIF."""

    def save(name: str, width: int = 40, height: int = 30, orientation: int = 1) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(len(name)).integers(0, 255, (height, width, 3), np.uint8)
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(pixels).save(path, exif=exif)
        return path

    return save


@pytest.fixture
def written(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """The json of labels that are written as one split."""

    def written(labels: Labels, **options: Any) -> dict[str, Any]:
        plan = Plan(tmp_path / "out" / "pets", "test", split="all", **options)
        (path,) = write_coco(labels, plan)
        return json.loads(path.read_text())

    return written
