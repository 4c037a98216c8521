"""Reads a COCO json and says in one line why it is none; the keypoint metadata it determines."""

import colorsys
import json
import logging
import math
import re
import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mask_rcnn_plus.errors import UserError

logger = logging.getLogger(__name__)

_show = reprlib.repr  # a value of unknown length, shortened

# What each entry of the json's three lists must have for detectron2 and the evaluator.
_FIELDS = {
    "images": ("id", "file_name", "height", "width"),
    "categories": ("id", "name"),
    "annotations": ("id", "image_id", "category_id", "bbox"),
}


def read_coco_json(path: Path) -> dict[str, Any]:
    """Reads a json and checks that it has COCO's structure.

    The structure is what loading relies on: the lists, their entries' fields and types, unique
    ids, ids that refer to an entry, and run lengths (RLE) that fill their image. Polygons are not
    looked at.

    Args:
        path: the json file.

    Returns:
        the json's content.

    Raises:
        UserError: the file is missing, cannot be read, is no json, or is not COCO; the message
            names the first entry at fault by its list, index and id.
    """
    content = _parse(path)
    if not isinstance(content, dict):
        raise _not_coco(path, f"it holds a {type(content).__name__}, not an object")
    ids: dict[str, set[int | str]] = {}
    for section, fields in _FIELDS.items():
        entries = content.get(section)
        if not isinstance(entries, list):
            raise _not_coco(path, f"it has no list '{section}'")
        ids[section] = _check_entries(path, section, entries, fields)
    if not content["categories"]:
        raise _not_coco(path, "its list 'categories' is empty")
    sizes = {image["id"]: [image["height"], image["width"]] for image in content["images"]}
    for section, entry_fault in (
        ("images", _image_fault),
        ("categories", _category_fault),
        ("annotations", lambda entry: _annotation_fault(entry, ids, sizes)),
    ):
        for index, entry in enumerate(content[section]):
            if fault := entry_fault(entry):
                raise _not_coco(path, f"{section}[{index}] (id {entry['id']!r}) {fault}")
    return content


def keypoint_metadata(categories: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """detectron2's keypoint metadata, as far as COCO categories determine it.

    Args:
        categories: the json's list of that name.

    Returns:
        nothing if no category names keypoints, or if categories disagree about them; else
        "keypoint_names", with a skeleton "keypoint_connection_rules" of (name, name, RGB colour),
        and "keypoint_flip_map", the pairs of names that swap in a mirrored image, if all names
        with "left" or "right" come in pairs. Where no name says left or right, whether a
        mirrored image keeps its points is unknown, and the map is left to the user.
    """
    named = [c for c in categories if c.get("keypoints")]
    if not named:
        return {}
    names = named[0]["keypoints"]
    if not _is_names(names) or any(c["keypoints"] != names for c in named):
        logger.warning("Categories differ in their 'keypoints': no keypoint metadata is set")
        return {}
    metadata: dict[str, Any] = {"keypoint_names": list(names)}
    links = named[0].get("skeleton")
    if links and all(_is_link(link, len(names)) for link in links):
        metadata["keypoint_connection_rules"] = [
            (names[first - 1], names[second - 1], _colour(index / len(links)))
            for index, (first, second) in enumerate(links)
        ]
    sided = {name: _mirrored(name) for name in names if _mirrored(name) != name}
    if sided and all(other in sided for other in sided.values()):
        metadata["keypoint_flip_map"] = [
            (name, other) for name, other in sided.items() if names.index(name) < names.index(other)
        ]
    return metadata


def _parse(path: Path) -> Any:
    if not path.is_file():
        raise UserError(f"there is no file '{path}'")
    try:
        with path.open() as file:  # as pycocotools opens it
            return json.load(file)
    except OSError as error:
        raise UserError(f"'{path}' cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"'{path}' is no json: {error}") from error


def _not_coco(path: Path, fault: str) -> UserError:
    return UserError(f"'{path}' is not in COCO format: {fault}; see datasets/README.md")


def _check_entries(
    path: Path, section: str, entries: list[Any], fields: tuple[str, ...]
) -> set[int | str]:
    """The entries' ids, after checking that the fields are there and the ids unique."""
    ids: set[int | str] = set()
    for index, entry in enumerate(entries):
        where = f"{section}[{index}]"
        if not isinstance(entry, dict):
            raise _not_coco(path, f"{where} is a {type(entry).__name__}, not an object")
        for field in fields:
            if field not in entry:
                needs = ", ".join(f"'{name}'" for name in fields)
                raise _not_coco(path, f"{where} has no '{field}' (it needs {needs})")
        identity = entry["id"]
        if not _is_id(identity):
            raise _not_coco(path, f"{where} has the id {_show(identity)}, which is no whole number")
        if identity in ids:
            raise _not_coco(path, f"{where} has the id {_show(identity)} of an earlier entry")
        ids.add(identity)
    if len({type(identity) for identity in ids}) > 1:
        raise _not_coco(path, f"the ids in '{section}' are partly numbers, partly text")
    return ids


def _image_fault(image: dict[str, Any]) -> str:
    if not isinstance(image["file_name"], str) or not image["file_name"]:
        return f"has the file_name {_show(image['file_name'])}, which is no text"
    for side in ("height", "width"):
        if type(image[side]) is not int or image[side] < 1:
            return f"has the {side} {_show(image[side])}, which is no whole number of pixels"
    return ""


def _category_fault(category: dict[str, Any]) -> str:
    if not isinstance(category["name"], str):
        return f"has the name {_show(category['name'])}, which is no text"
    return ""


def _annotation_fault(
    annotation: dict[str, Any],
    ids: dict[str, set[int | str]],
    sizes: dict[int | str, list[int]],
) -> str:
    for field, section in (("image_id", "images"), ("category_id", "categories")):
        if not _is_id(annotation[field]) or annotation[field] not in ids[section]:
            return f"has the {field} {_show(annotation[field])}, which is not in '{section}'"
    box = annotation["bbox"]
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
        return f"has the bbox {_show(box)}, which is not [x, y, width, height] in pixels"
    mask = annotation.get("segmentation")
    if isinstance(mask, dict):
        return _rle_fault(mask, sizes[annotation["image_id"]])
    return ""


def _rle_fault(rle: dict[str, Any], size: list[int]) -> str:
    """pycocotools reads beyond its memory, or never ends, where run lengths do not fit."""
    if rle.get("size") != size:
        return f"has an RLE of the size {_show(rle.get('size'))}, and its image {size}"
    counts = rle.get("counts")
    if isinstance(counts, str):
        counts = _decompress(counts)
    if not isinstance(counts, list) or not all(type(n) is int and n >= 0 for n in counts):
        return "has an RLE whose 'counts' are no run lengths"
    if sum(counts) != size[0] * size[1]:
        return f"has an RLE of {sum(counts)} pixels, and its image {size[0] * size[1]}"
    return ""


def _decompress(text: str) -> list[int] | None:
    """The run lengths in COCO's compressed form, or None if it is not that.

    A number is written five bits a character from 48 on, least first; bit 6 says that more follow,
    bit 5 of the last is the sign. From the fourth run on, it is the difference to the last but one.
    """
    counts: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64 or shift > 60:
            return None
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        counts.append(value + counts[-2] if len(counts) > 2 else value)
        value = shift = 0
    return counts if shift == 0 else None


def _is_id(value: object) -> bool:
    return type(value) in (int, str)


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]


def _is_names(names: object) -> bool:
    return isinstance(names, list) and all(isinstance(name, str) for name in names)


def _is_link(link: object, count: int) -> bool:
    """Whether it is a pair of numbers of keypoints, counted from 1."""
    if not isinstance(link, (list, tuple)) or len(link) != 2:
        return False
    return all(type(end) is int and 1 <= end <= count for end in link)


def _mirrored(name: str) -> str:
    """The name with left and right exchanged; "bright" is on no side."""
    swap = {"left": "right", "right": "left", "Left": "Right", "Right": "Left"}
    return re.sub("(?<![a-z])(?:left|right)|Left|Right", lambda match: swap[match[0]], name)


def _colour(hue: float) -> tuple[int, int, int]:
    red, green, blue = (round(255 * part) for part in colorsys.hsv_to_rgb(hue, 0.8, 1.0))
    return red, green, blue
