"""Checks a json without its images: entries, ids, references, boxes, masks, flags, duplicates."""

import math
import reprlib
from collections import Counter
from typing import Any, NamedTuple

import numpy as np

from mask_rcnn_plus.data.coco_json import (
    category_fault,
    folded,
    image_fault,
    is_whole,
    outline_fault,
)
from mask_rcnn_plus.data.mask_rules import are_numbers, is_number
from mask_rcnn_tools.check.annotations import (
    check_crowds,
    check_duplicates,
    check_flags,
    check_keypoints,
    is_crowd,
    keypoints_fault,
)
from mask_rcnn_tools.check.images import ImageEntry
from mask_rcnn_tools.check.masks import (
    Flags,
    Floats,
    Size,
    check_masks,
    place_in_image,
)
from mask_rcnn_tools.check.problems import Annotations, Problem, Problems, by_kind, is_key
from mask_rcnn_tools.progress import progress_bar

_show = reprlib.repr
_MAX_SHAPES = 5000  # boxes that are kept to compare them with anchors
# A box may differ from its mask's box by this many pixels, or this fraction of its longer side.
_PIXELS, _FRACTION = 2.0, 0.05
# Without masks, boxes count as [x0, y0, x1, y1] only if all of them can be, and at least this many
# (and this fraction of them) are invalid as [x, y, width, height].
_MIN_COUNT, _MIN_FRACTION = 3, 0.1


class Inspection(NamedTuple):
    """The result of checking a json without its images.

    Attributes:
        problems: sorted by kind.
        annotations: the number of annotations in the json.
        images: those with a file name; height and width are 0 if they are not valid.
        categories: the json's; empty if the json is not in COCO format.
        classes: (name, number of annotations, number of crowds among them), in the order of the
            ids.
        shapes: (width, height of a box, width, height of its image) in pixels, for a sample of the
            boxes.
        keypoints: the names of the keypoints; empty if the annotated categories have none or
            different ones.
    """

    problems: list[Problem]
    annotations: int
    images: list[ImageEntry]
    categories: list[dict[str, Any]]
    classes: list[tuple[str, int, int]]
    shapes: list[tuple[float, float, int, int]]
    keypoints: list[str]


def inspect(content: Any) -> Inspection:
    """Checks the content of a json, which may be anything. It is not changed."""
    if fault := outline_fault(content):
        return Inspection([Problem("no-coco", detail=fault)], 0, [], [], [], [], [])
    problems = Problems(content)
    if not content["images"]:
        problems.items.append(Problem("no-images", detail="the file lists no images"))
    image_ids = _check_ids(problems, "images")
    category_ids = _check_ids(problems, "categories")
    problems.images = {key: content["images"][position] for key, position in image_ids.items()}
    images, sizes = _check_images(problems)
    _check_categories(problems, category_ids)
    _check_ids(problems, "annotations")
    annotations = _check_references(problems, image_ids, category_ids, sizes)
    total = len(annotations.entries)
    mask_boxes = [np.zeros((0, 4))]
    with progress_bar("checking annotations", "annotation", total=total) as bar:
        for chunk in check_masks(annotations):
            mask_boxes.append(chunk)
            bar.update(len(chunk))
    boxes = _check_boxes(annotations, np.concatenate(mask_boxes))
    check_flags(annotations)
    check_crowds(annotations)
    keypoints = check_keypoints(annotations)
    check_duplicates(annotations)
    return Inspection(
        sorted(problems.items, key=by_kind),
        len(content["annotations"]),
        images,
        content["categories"],
        _count_classes(content["categories"], annotations),
        _sample_shapes(boxes, annotations),
        keypoints,
    )


def _check_ids(problems: Problems, section: str) -> dict[Any, int]:
    """The position of the first entry with each id."""
    positions: dict[Any, int] = {}
    for position, entry in enumerate(problems.content[section]):
        if type(entry) is not dict:
            problems.add("entry", section, position, f"is {_show(entry)}, not an object")
            continue
        key = entry.get("id")
        if key is None:
            problems.add("id-missing", section, position, "has no 'id'")
            continue
        if not is_whole(key):
            problems.add("id-type", section, position, f"has the id {_show(key)}")
            if not is_key(key):
                continue
        if key in positions:
            detail = f"has the id {_show(key)} of an earlier entry"
            problems.add("id-duplicate", section, position, detail)
            continue
        positions[key] = position
        if key == 0 and section == "annotations":
            problems.add("id-zero", section, position, "has the id 0")
    return positions


def _check_images(problems: Problems) -> tuple[list[ImageEntry], dict[int, Size]]:
    """The images with a file name, and (height, width) of each image with a valid size."""
    entries: list[ImageEntry] = []
    sizes: dict[int, Size] = {}
    names: set[str] = set()
    for position, image in enumerate(problems.content["images"]):
        if type(image) is not dict:
            continue
        fault = _missing_field(image, "file_name", "height", "width") or image_fault(image)
        name: Any = image.get("file_name")
        if fault:
            problems.add("image-field", "images", position, fault)
        else:
            sizes[position] = (image["height"], image["width"])
            if name in names:
                detail = "has the file_name of an earlier image"
                problems.add("image-twin", "images", position, detail)
            names.add(name)
        if name and type(name) is str:
            size = sizes.get(position, (0, 0))
            entries.append(ImageEntry(position, image.get("id"), name, *size))
    return entries, sizes


def _missing_field(entry: dict[str, Any], *fields: str) -> str:
    return next((f"has no '{name}'" for name in fields if name not in entry), "")


def _check_categories(problems: Problems, positions: dict[Any, int]) -> None:
    names: set[str] = set()
    similar_names: dict[str, str] = {}  # folded -> the first name
    for position, category in enumerate(problems.content["categories"]):
        if type(category) is not dict:
            continue
        if fault := _missing_field(category, "name") or category_fault(category):
            problems.add("category-name", "categories", position, fault)
            continue
        name = category["name"]
        similar = similar_names.setdefault(folded(name), name)
        if name in names:
            detail = f"has the name {_show(name)} of an earlier category"
            problems.add("category-twin", "categories", position, detail)
        elif name != similar:
            detail = f"has the name {_show(name)}, and an earlier one has {_show(similar)}"
            problems.add("category-similar", "categories", position, detail)
        names.add(name)
    ids = sorted(key for key in positions if type(key) is int)
    if ids != list(range(1, len(ids) + 1)):
        first = next(key for rank, key in enumerate(ids, 1) if key != rank)
        detail = (
            f"has the id {first}, but the ids of {len(ids)} categories should be 1 to {len(ids)}"
        )
        problems.add("category-gap", "categories", positions[first], detail)


def _check_references(
    problems: Problems,
    images: dict[Any, int],
    categories: dict[Any, int],
    sizes: dict[int, Size],
) -> Annotations:
    """The annotations whose image and category exist."""
    annotations = Annotations(problems)
    content = problems.content
    keypoint_names = {
        key: content["categories"][position].get("keypoints")
        for key, position in categories.items()
    }
    used: set[Any] = set()
    only_crowds: dict[int, bool] = {}  # position of an image with annotations -> all are crowds
    for position, annotation in enumerate(content["annotations"]):
        if type(annotation) is not dict:
            continue
        image_id, category_id = annotation.get("image_id"), annotation.get("category_id")
        image = images.get(image_id) if is_key(image_id) else None
        if image is None:
            detail = f"has the image_id {_show(image_id)}, which is not in 'images'"
            problems.add("unknown-image", "annotations", position, detail)
            continue
        if not is_key(category_id) or category_id not in categories:
            detail = f"has the category_id {_show(category_id)}, which is not in 'categories'"
            problems.add("unknown-category", "annotations", position, detail)
            continue
        used.add(category_id)
        only_crowds[image] = is_crowd(annotation) and only_crowds.get(image, True)
        names = keypoint_names[category_id]
        if fault := keypoints_fault(annotation.get("keypoints"), names):
            problems.add("keypoints", "annotations", position, fault)
        annotations.positions.append(position)
        annotations.entries.append(annotation)
        annotations.sizes.append(sizes.get(image))
    for key, position in categories.items():
        if key not in used:
            problems.add("category-unused", "categories", position)
    for position in images.values():
        if position not in only_crowds:
            problems.add("image-empty", "images", position)
        elif only_crowds[position]:
            problems.add("crowd-only", "images", position)
    return annotations


def _check_boxes(annotations: Annotations, mask_boxes: Floats) -> Floats:
    """Checks the boxes of N annotations.

    Args:
        annotations: the annotations.
        mask_boxes: (N, 4): x0, y0, x1, y1 around their masks, in pixels; NaN without a mask.

    Returns:
        (N, 4): x, y, width, height as in the json; NaN if that is not four finite numbers.
    """
    boxes = _read_boxes(annotations)

    def add(kind: str, which: Flags) -> None:
        for index in np.flatnonzero(which).tolist():
            size = annotations.sizes[index]
            image = f", and its image is {size[1]} x {size[0]}" if size else ""
            detail = f"has the bbox {annotations.entries[index]['bbox']}{image}"
            annotations.add_problem(kind, index, detail)

    with np.errstate(invalid="ignore", over="ignore"):
        corners, normalised = _other_formats(boxes, annotations.sizes, mask_boxes)
        add("box-xyxy", corners)
        add("box-normalised", normalised & ~corners)
        rest = np.isfinite(boxes).all(1) & ~corners & ~normalised
        negative = rest & (boxes[:, 2:] < 0).any(1)
        add("box-negative", negative)
        empty = rest & ~negative & (boxes[:, 2:] == 0).any(1)
        add("box-empty", empty)
        rest &= ~negative & ~empty
        extents = _extents(boxes)
        outside, over_edge = place_in_image(extents, annotations.sizes)
        add("box-outside", rest & outside)
        add("box-over-edge", rest & over_edge)
        for index in np.flatnonzero(rest & ~outside & ~_agree(extents, mask_boxes)).tolist():
            x0, y0, x1, y1 = mask_boxes[index].tolist()
            detail = (
                f"has the bbox {annotations.entries[index]['bbox']}, but its mask has the box "
                f"[{x0:g}, {y0:g}, {x1 - x0:g}, {y1 - y0:g}]"
            )
            annotations.add_problem("box-mask", index, detail)
    return boxes


def _read_boxes(annotations: Annotations) -> Floats:
    values: list[float] = []
    invalid = [np.nan] * 4
    for index, annotation in enumerate(annotations.entries):
        box: Any = annotation.get("bbox")
        if are_numbers(box, 4):
            if not all(is_number(value, 1e9) for value in box):
                annotations.add_problem("box-nan", index, f"has the bbox {_show(box)}")
                box = invalid
            values += box
        else:
            detail = f"has the bbox {_show(box)}" if "bbox" in annotation else "has no 'bbox'"
            annotations.add_problem("box-type", index, detail)
            values += invalid
    return np.array(values, np.float64).reshape(-1, 4)


def _other_formats(
    boxes: Floats, sizes: list[Size | None], mask_boxes: Floats
) -> tuple[Flags, Flags]:
    """Finds the boxes that are [x0, y0, x1, y1], and those that are fractions of the image."""
    sides = np.array([size or (np.nan, np.nan) for size in sizes], np.float64).reshape(-1, 2)
    scale = sides[:, [1, 0, 1, 0]]
    extents = _extents(boxes)
    has_mask = np.all(np.isfinite(mask_boxes), axis=1)
    has_size = np.all(np.isfinite(sides), axis=1)
    wrong = has_mask & ~_agree(extents, mask_boxes)
    corners = wrong & _agree(boxes, mask_boxes)
    normalised = wrong & has_size & (boxes <= 1).all(1) & _agree(extents * scale, mask_boxes)
    known = np.all(np.isfinite(boxes), axis=1) & has_size
    if known.any() and not has_mask.any():
        # Without masks to compare with, the boxes are judged together.
        fractions = np.all((boxes >= 0) & (boxes <= 1), axis=1) & (scale.min(1) > 2)
        ordered = np.all(boxes[:, 2:] > boxes[:, :2], axis=1) & np.all(boxes <= scale + 1, axis=1)
        beyond = ~np.all(extents[:, 2:] <= scale[:, :2] + 1, axis=1)
        many = beyond[known].sum() >= max(_MIN_COUNT, _MIN_FRACTION * known.sum())
        if fractions[known].all():
            normalised = known
        elif ordered[known].all() and many:
            corners = known
    return corners, normalised


def _extents(boxes: Floats) -> Floats:
    """x0, y0, x1, y1 from x, y, width, height."""
    return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)


def _agree(boxes: Floats, mask_boxes: Floats) -> Flags:
    """Whether boxes match those of their masks; true without a mask."""
    longer = (mask_boxes[:, 2:] - mask_boxes[:, :2]).max(1)
    allowed = np.maximum(_PIXELS, _FRACTION * longer)
    return ~(np.abs(boxes - mask_boxes).max(1) > allowed)


def _count_classes(categories: list[Any], annotations: Annotations) -> list[tuple[str, int, int]]:
    names: dict[Any, Any] = {}
    for category in categories:
        if type(category) is dict and is_key(key := category.get("id")):
            names.setdefault(key, category.get("name"))
    counts = Counter(entry["category_id"] for entry in annotations.entries)
    crowds = Counter(entry["category_id"] for entry in annotations.entries if is_crowd(entry))
    ordered = sorted(names, key=lambda key: (type(key) is str, key))
    return [(str(names[key]), counts[key], crowds[key]) for key in ordered]


def _sample_shapes(boxes: Floats, annotations: Annotations) -> list[tuple[float, float, int, int]]:
    valid = np.flatnonzero(np.isfinite(boxes).all(1) & (boxes[:, 2:] > 0).all(1))
    step = max(1, math.ceil(len(valid) / _MAX_SHAPES))
    shapes = []
    for index in valid[::step].tolist():
        if size := annotations.sizes[index]:
            width, height = boxes[index, 2:].tolist()
            shapes.append((width, height, size[1], size[0]))
    return shapes
