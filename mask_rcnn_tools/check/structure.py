"""Entries, ids and references: what everything else in a json rests on."""

import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mask_rcnn_plus.data.coco_json import category_fault, image_fault, is_names, is_whole
from mask_rcnn_tools.check.problems import Findings

_show = reprlib.repr


@dataclass(frozen=True)
class Objects:
    """The annotations that can be looked at further: those of a known image.

    Attributes:
        indices: their places in the json's list.
        annotations: themselves.
        sizes: of their images, (height, width), or None where the json does not say.
    """

    indices: list[int]
    annotations: list[dict[str, Any]]
    sizes: list[tuple[int, int] | None]


def check_structure(findings: Findings) -> Objects:
    """Checks the entries of the three lists, without their boxes and masks.

    Args:
        findings: gets the problems.
    """
    content = findings.content
    images = _check_ids(findings, "images")
    categories = _check_ids(findings, "categories")
    findings.images = {key: content["images"][index] for key, index in images.items()}
    sizes = _check_images(findings)
    _check_categories(findings, categories)
    _check_ids(findings, "annotations")
    return _check_references(findings, images, categories, sizes)


def is_id(value: Any) -> bool:
    """Whether a value can be looked up as an id, though it should be a whole number."""
    return type(value) in (int, str, float)


def _check_ids(findings: Findings, section: str) -> dict[Any, int]:
    """The place of each id's first entry."""
    places: dict[Any, int] = {}
    for index, entry in enumerate(findings.content[section]):
        if type(entry) is not dict:
            findings.add("entry", section, index, f"is {_show(entry)}, no object")
            continue
        identity = entry.get("id")
        if not is_whole(identity):
            if identity is None:
                findings.add("id-missing", section, index, "has no 'id'")
                continue
            findings.add("id-type", section, index, f"has the id {_show(identity)}")
            if not is_id(identity):
                continue
        if identity in places:
            findings.add(
                "id-duplicate", section, index, f"has the id {_show(identity)} of an earlier entry"
            )
            continue
        places[identity] = index
        if identity == 0 and section == "annotations":
            findings.add("id-zero", section, index, "has the id 0")
    return places


def _check_images(findings: Findings) -> dict[int, tuple[int, int]]:
    """(height, width) of each image that has a usable size, by its place."""
    sizes = {}
    names: set[str] = set()
    for index, image in enumerate(findings.content["images"]):
        if type(image) is not dict:
            continue
        fault = _missing(image, ("file_name", "height", "width")) or image_fault(image)
        if fault:
            findings.add("image-field", "images", index, fault)
            continue
        sizes[index] = (image["height"], image["width"])
        if image["file_name"] in names:
            findings.add("image-twin", "images", index, "has the file_name of an earlier one")
        names.add(image["file_name"])
    return sizes


def _missing(entry: dict[str, Any], fields: Sequence[str]) -> str:
    return next((f"has no '{name}'" for name in fields if name not in entry), "")


def _check_categories(findings: Findings, places: dict[Any, int]) -> None:
    names: set[str] = set()
    for index, category in enumerate(findings.content["categories"]):
        if type(category) is not dict:
            continue
        if fault := _missing(category, ("name",)) or category_fault(category):
            findings.add("category-name", "categories", index, fault)
        elif category["name"] in names:
            detail = f"has the name {_show(category['name'])} of an earlier one"
            findings.add("category-twin", "categories", index, detail)
        else:
            names.add(category["name"])
    ids = sorted(key for key in places if type(key) is int)
    if ids != list(range(1, len(ids) + 1)):
        odd = next(key for rank, key in enumerate(ids, 1) if key != rank)
        detail = f"has the id {odd}: the {len(ids)} ids are not 1 to {len(ids)}"
        findings.add("category-gap", "categories", places[odd], detail)


def _check_references(
    findings: Findings,
    images: dict[Any, int],
    categories: dict[Any, int],
    sizes: dict[int, tuple[int, int]],
) -> Objects:
    objects = Objects([], [], [])
    names = {
        key: findings.content["categories"][i].get("keypoints") for key, i in categories.items()
    }
    used: set[Any] = set()
    seen: dict[int, bool] = {}  # place of an image with annotations -> whether all are crowds
    for index, annotation in enumerate(findings.content["annotations"]):
        if type(annotation) is not dict:
            continue
        image_id, category_id = annotation.get("image_id"), annotation.get("category_id")
        place = images.get(image_id) if is_id(image_id) else None
        if place is None:
            detail = f"has the image_id {_show(image_id)}, which is not in 'images'"
            findings.add("unknown-image", "annotations", index, detail)
            continue
        if not is_id(category_id) or category_id not in categories:
            detail = f"has the category_id {_show(category_id)}, which is not in 'categories'"
            findings.add("unknown-category", "annotations", index, detail)
            continue
        used.add(category_id)
        crowd = annotation.get("iscrowd", 0) not in (0, False, None)
        seen[place] = crowd and seen.get(place, True)
        if "keypoints" in annotation:
            _check_keypoints(findings, index, annotation["keypoints"], names[category_id])
        objects.indices.append(index)
        objects.annotations.append(annotation)
        objects.sizes.append(sizes.get(place))
    for key, place in categories.items():
        if key not in used:
            findings.add("category-unused", "categories", place)
    for place in images.values():
        if place not in seen:
            findings.add("image-empty", "images", place)
        elif seen[place]:
            findings.add("crowd-only", "images", place)
    return objects


def _check_keypoints(findings: Findings, index: int, keypoints: Any, names: Any) -> None:
    if not keypoints and isinstance(keypoints, list | None):
        return
    if not isinstance(keypoints, list) or not set(map(type, keypoints)) <= {int, float}:
        fault = f"has the keypoints {_show(keypoints)}, which are no list of numbers"
    elif not all(-1e6 < value < 1e6 for value in keypoints):
        fault = "has a keypoint that is not finite"
    elif len(keypoints) % 3:
        fault = f"has {len(keypoints)} numbers for keypoints, no multiple of 3"
    elif names and is_names(names) and len(keypoints) != 3 * len(names):
        fault = f"has {len(keypoints) // 3} keypoints, and its category {len(names)} names"
    else:
        return
    findings.add("keypoints", "annotations", index, fault)
