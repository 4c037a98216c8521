"""What mends one annotation, category or image of a json."""

from collections.abc import Callable
from typing import Any

import numpy as np

from mask_rcnn_tools.check.masks import segmentation_kind
from mask_rcnn_tools.check.polygons import good_polygons, measure_polygons
from mask_rcnn_tools.check.problems import KINDS
from mask_rcnn_tools.check.run_lengths import measure_rles


def corners(box: Any) -> list[float] | None:
    """(x0, y0, x1, y1) of a json's box, if it is one."""
    if isinstance(box, list) and len(box) == 4 and set(map(type, box)) <= {int, float}:
        return [box[0], box[1], box[0] + box[2], box[1] + box[3]]
    return None


def size_of(image: dict[str, Any]) -> tuple[int, int] | None:
    """(height, width) as the json has it, or None."""
    height, width = image.get("height"), image.get("width")
    return (height, width) if type(height) is int and type(width) is int else None


def polygon_box(annotation: dict[str, Any], size: tuple[int, int] | None) -> list[float] | None:
    """(x0, y0, x1, y1) of what lies in the image of an annotation's polygons; None without any."""
    kind = segmentation_kind(annotation.get("segmentation"))
    return _mask(annotation, size)[0] if kind == "polygons" else None


def _mask(
    annotation: dict[str, Any], size: tuple[int, int] | None
) -> tuple[list[float] | None, float]:
    """A mask's box (x0, y0, x1, y1) in its image, and its area; None and 0 without a good one."""
    segmentation: Any = annotation.get("segmentation")
    kind = segmentation_kind(segmentation)
    if kind == "polygons":
        boxes, areas = measure_polygons([segmentation], [size], lambda *_: None)
    elif kind == "rle" and size is not None:
        _, boxes, areas = measure_rles([segmentation], [size])
    else:
        return None, 0.0
    if not np.isfinite(boxes).all():
        return None, 0.0
    x0, y0, x1, y1 = boxes[0].tolist()
    if size is not None:
        x0, y0, x1, y1 = max(x0, 0.0), max(y0, 0.0), min(x1, size[1]), min(y1, size[0])
    return ([x0, y0, x1, y1] if x1 > x0 and y1 > y0 else None), float(areas[0])


# What mends an entry in place, given it and its image; whether the entry stays.
Action = Callable[[Any, dict[str, Any]], bool]


def _take_box(annotation: dict[str, Any], image: dict[str, Any]) -> bool:
    box, _ = _mask(annotation, size_of(image))
    if box is not None:
        annotation["bbox"] = [box[0], box[1], box[2] - box[0], box[3] - box[1]]
    return box is not None


def _from_corners(annotation: dict[str, Any], image: dict[str, Any]) -> bool:
    x0, y0, x1, y1 = annotation["bbox"]
    annotation["bbox"] = [x0, y0, x1 - x0, y1 - y0]
    return True


def _scale(annotation: dict[str, Any], image: dict[str, Any]) -> bool:
    sides = [image["width"], image["height"]] * 2
    annotation["bbox"] = [v * side for v, side in zip(annotation["bbox"], sides, strict=True)]
    return True


def _sift(annotation: dict[str, Any], image: dict[str, Any]) -> bool:
    polygons = good_polygons(annotation["segmentation"], size_of(image))
    annotation["segmentation"] = polygons
    return bool(polygons)


def _nest(annotation: dict[str, Any], image: dict[str, Any]) -> bool:
    annotation["segmentation"] = [annotation["segmentation"]]
    return True


def _set_area(annotation: dict[str, Any], image: dict[str, Any]) -> bool:
    box, area = _mask(annotation, size_of(image))
    if box is None and (box := corners(annotation.get("bbox"))) is not None:
        area = max(box[2] - box[0], 0.0) * max(box[3] - box[1], 0.0)
    annotation["area"] = area if 0 <= area < 1e12 else 0.0
    return True


def _set(field: str, value: Callable[[dict[str, Any]], Any]) -> Action:
    def action(entry: dict[str, Any], image: dict[str, Any]) -> bool:
        entry[field] = value(entry)
        return True

    return action


def _make_crowd(annotation: dict[str, Any], image: dict[str, Any]) -> bool:
    del annotation["ignore"]
    annotation["iscrowd"] = 1
    return True


def _take_keypoints_off(annotation: dict[str, Any], image: dict[str, Any]) -> bool:
    del annotation["keypoints"]
    annotation.pop("num_keypoints", None)
    return True


def _is_crowd(annotation: dict[str, Any]) -> int:
    return int(annotation["iscrowd"] not in (0, None, "0", "", "false", "False", [], {}))


ACTIONS: dict[str, Action] = {
    "category-name": _set("name", lambda category: f"category_{category.get('id')}"),
    "mask-flat": _nest,
    "box-xyxy": _from_corners,
    "box-normalised": _scale,
    "crowd-flag": _set("iscrowd", _is_crowd),
    "crowd-missing": _set("iscrowd", lambda _: 0),
    "ignore": _make_crowd,
    "area": _set_area,
    "area-missing": _set_area,
    "keypoints": _take_keypoints_off,
    **{kind: _sift for kind in KINDS if kind.startswith("polygon-")},
    **{f"box-{k}": _take_box for k in ("type", "nan", "negative", "outside", "empty", "mask")},
}
