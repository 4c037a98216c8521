"""Masks of a COCO json, and masks to compare them with."""

from typing import Any

import numpy as np
from pycocotools import mask as coco_mask


def masks_of(coco: dict[str, Any], file_name: str) -> list[tuple[str, np.ndarray]]:
    """(class, mask) of each object of an image, decoded by pycocotools."""
    (image,) = [image for image in coco["images"] if image["file_name"] == file_name]
    height, width = image["height"], image["width"]
    names = {category["id"]: category["name"] for category in coco["categories"]}
    result = []
    for annotation in coco["annotations"]:
        if annotation["image_id"] != image["id"]:
            continue
        segmentation = annotation["segmentation"]
        if isinstance(segmentation, list):
            mask = coco_mask.decode(
                coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))
            )
        else:
            mask = coco_mask.decode(segmentation)
        x, y, w, h = annotation["bbox"]
        rows, columns = np.nonzero(mask)
        assert annotation["area"] == mask.sum()
        # The box contains the mask, with at most one pixel around it.
        assert x - 1e-6 <= columns.min() + 0.5 and columns.max() + 0.5 <= x + w + 1e-6
        assert w - 1.001 <= columns.max() + 1 - columns.min() <= w + 1.001
        assert y - 1e-6 <= rows.min() + 0.5 and rows.max() + 0.5 <= y + h + 1e-6
        assert h - 1.001 <= rows.max() + 1 - rows.min() <= h + 1.001
        result.append((names[annotation["category_id"]], mask.astype(bool)))
    return result


def box(height: int, width: int, x0: int, y0: int, x1: int, y1: int) -> np.ndarray:
    """A mask of the pixels from (x0, y0) to (x1, y1), excluding row y1 and column x1."""
    mask = np.zeros((height, width), bool)
    mask[y0:y1, x0:x1] = True
    return mask


def disc(height: int, width: int, cx: float, cy: float, rx: float, ry: float) -> np.ndarray:
    """A mask of the pixels whose centres are inside an ellipse."""
    y, x = np.mgrid[:height, :width] + 0.5
    return ((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2 <= 1
