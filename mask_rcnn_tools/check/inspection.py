"""All that can be said of a json's content without its images."""

import math
import sys
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from mask_rcnn_plus.data.coco_json import outline_fault
from mask_rcnn_tools.check.boxes import check_boxes, check_flags, check_twins
from mask_rcnn_tools.check.images import Entry
from mask_rcnn_tools.check.masks import check_masks
from mask_rcnn_tools.check.problems import KINDS, Findings, Problem
from mask_rcnn_tools.check.structure import Objects, check_structure, is_id

_SHAPES = 5000  # boxes kept for the comparison with anchors


class Inspection(NamedTuple):
    """What is kept of a json.

    Attributes:
        problems: in the order of their kind.
        annotations: how many there are.
        images: those with a file name; their size is 0 where it cannot be used.
        categories: of the json; empty if it is no COCO.
        classes: (name, annotations, of which crowds), in the order of their ids.
        shapes: (width, height of a box, width, height of its image) in pixels, of a sample.
    """

    problems: list[Problem]
    annotations: int
    images: list[Entry]
    categories: list[dict[str, Any]]
    classes: list[tuple[str, int, int]]
    shapes: list[tuple[float, float, int, int]]


def inspect(content: Any, *, progress: bool = False) -> Inspection:
    """Checks a json's content.

    Args:
        content: whatever the json holds. It is not changed.
        progress: shows a bar on standard error where it takes longer than two seconds.
    """
    if fault := outline_fault(content):
        return Inspection([Problem("no-coco", detail=fault)], 0, [], [], [], [])
    findings = Findings(content)
    if not content["images"]:
        findings.problems.append(Problem("no-images", detail="has no images"))
    objects = check_structure(findings)
    masks = [np.zeros((0, 4))]
    bar = tqdm(
        total=len(objects.indices),
        desc="checking annotations",
        unit="annotation",
        delay=2,
        leave=False,
        file=sys.stderr,
        disable=not progress or None,  # None: only on a terminal
    )
    with bar:
        for count, boxes, _ in check_masks(findings, objects):
            masks.append(boxes)
            bar.update(count)
    boxes = check_boxes(findings, objects, np.concatenate(masks))
    check_flags(findings, objects)
    check_twins(findings, objects)
    order = {kind: rank for rank, kind in enumerate(KINDS)}
    findings.problems.sort(key=lambda problem: order[problem.kind])
    return Inspection(
        findings.problems,
        len(content["annotations"]),
        _entries(findings),
        content["categories"],
        _classes(content["categories"], objects),
        _shapes(boxes, objects),
    )


def _entries(findings: Findings) -> list[Entry]:
    bad = {
        p.position for p in findings.problems if p.section == "images" and p.kind == "image-field"
    }
    entries = []
    for index, image in enumerate(findings.content["images"]):
        if type(image) is not dict or not image.get("file_name"):
            continue
        if type(image["file_name"]) is str:
            height, width = (0, 0) if index in bad else (image["height"], image["width"])
            entries.append(Entry(index, image.get("id"), image["file_name"], height, width))
    return entries


def _classes(categories: list[Any], objects: Objects) -> list[tuple[str, int, int]]:
    counts: dict[Any, list[int]] = {
        category["id"]: [0, 0]
        for category in categories
        if type(category) is dict and is_id(category.get("id"))
    }
    for annotation in objects.annotations:
        both = counts[annotation["category_id"]]
        both[0] += 1
        both[1] += annotation.get("iscrowd") not in (0, None, False)
    names = {
        c["id"]: c.get("name")
        for c in reversed(categories)
        if type(c) is dict and "id" in c and is_id(c["id"])
    }
    ordered = sorted(counts, key=lambda key: (type(key) is str, key))
    return [(str(names[key]), counts[key][0], counts[key][1]) for key in ordered]


def _shapes(boxes: Any, objects: Objects) -> list[tuple[float, float, int, int]]:
    good = np.flatnonzero(np.isfinite(boxes).all(1) & (boxes[:, 2:] > 0).all(1))
    step = max(1, math.ceil(len(good) / _SHAPES))
    shapes = []
    for place in good[::step].tolist():
        size = objects.sizes[place]
        if size is not None:
            width, height = boxes[place, 2:].tolist()
            shapes.append((width, height, size[1], size[0]))
    return shapes
