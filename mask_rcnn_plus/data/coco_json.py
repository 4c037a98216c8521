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

from mask_rcnn_plus.data.mask_rules import max_pixels, segmentation_fault
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
    ids, ids that refer to an entry, and masks that pycocotools can take without harm. Whatever else
    can be wrong is the data check's (``mask_rcnn_tools.check``).

    Args:
        path: the json file.

    Returns:
        the json's content.

    Raises:
        UserError: the file is missing, cannot be read, is no json, or is not COCO; the message
            names the first entry at fault by its list, index and id.
    """
    content = parse(path)
    if fault := outline_fault(content):
        raise _not_coco(path, fault)
    ids = {
        section: _check_entries(path, section, content[section], fields)
        for section, fields in _FIELDS.items()
    }
    sizes = {image["id"]: [image["height"], image["width"]] for image in content["images"]}
    for section, entry_fault in (
        ("images", image_fault),
        ("categories", category_fault),
        ("annotations", lambda entry: _annotation_fault(entry, ids, sizes)),
    ):
        for index, entry in enumerate(content[section]):
            if fault := entry_fault(entry):
                raise _not_coco(path, f"{section}[{index}] (id {entry['id']!r}) {fault}")
    return content


def outline_fault(content: Any) -> str:
    """Why a json's content is no COCO at all, or ""."""
    if not isinstance(content, dict):
        return f"it holds a {type(content).__name__}, not an object"
    for section in _FIELDS:
        if not isinstance(content.get(section), list):
            return f"it has no list '{section}'"
    return "" if content["categories"] else "its list 'categories' is empty"


# The jsons that the data check has found in order, with their categories: none is read again just
# to be refused.
_vetted: dict[tuple[Path, int, int], list[dict[str, Any]]] = {}
# Those of which that is known of the masks alone.
_harmless: set[tuple[Path, int, int]] = set()


def file_stamp(path: Path) -> tuple[Path, int, int] | None:
    """Changes when the file does; None if there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return path, status.st_mtime_ns, status.st_size


def mark_vetted(stamp: tuple[Path, int, int], categories: list[dict[str, Any]]) -> None:
    """Notes that ``read_coco_json`` would find nothing wrong with a json.

    Args:
        stamp: the json's ``file_stamp`` from before it was read.
        categories: its list of that name.
    """
    _vetted[stamp] = categories


def read_categories(path: Path) -> list[dict[str, Any]]:
    """A json's categories, after all that ``read_coco_json`` checks; it is not read if vetted."""
    stamp = file_stamp(path)
    if stamp is not None and stamp in _vetted:
        return _vetted[stamp]
    return read_coco_json(path)["categories"]


def refuse_harmful_masks(path: Path) -> None:
    """Refuses a json with a mask that pycocotools must not see; the rest is left to others.

    Args:
        path: of a data set that another package loads, which has no rules of ours to follow.

    Raises:
        UserError: there is such a mask, or the file is no json.
    """
    stamp = file_stamp(path)
    if stamp is None or stamp in _vetted or stamp in _harmless:
        return
    content = parse(path)
    if outline_fault(content):
        return
    sizes: dict[int | str, list[Any]] = {
        image["id"]: [image.get("height"), image.get("width")]
        for image in content["images"]
        if isinstance(image, dict) and _is_id(image.get("id"))
    }
    for index, annotation in enumerate(content["annotations"]):
        if not isinstance(annotation, dict) or not _is_id(annotation.get("image_id")):
            continue
        if annotation["image_id"] in sizes and (
            fault := segmentation_fault(
                annotation.get("segmentation"), sizes[annotation["image_id"]]
            )
        ):
            where = f"annotations[{index}] (id {_show(annotation.get('id'))})"
            raise _not_coco(path, f"{where} {fault}")
    _harmless.add(stamp)


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
    if not is_names(names) or any(c["keypoints"] != names for c in named):
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


def parse(path: Path) -> Any:
    """A json's content, whatever it is.

    Raises:
        UserError: the file is missing, cannot be read, or is no json.
    """
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


def image_fault(image: dict[str, Any]) -> str:
    """What is wrong with an image's file name or size, as the end of a sentence, or ""."""
    if not isinstance(image["file_name"], str) or not image["file_name"]:
        return f"has the file_name {_show(image['file_name'])}, which is no text"
    for side in ("height", "width"):
        if type(image[side]) is not int or image[side] < 1:
            return f"has the {side} {_show(image[side])}, which is no whole number of pixels"
    if image["height"] * image["width"] > max_pixels():
        return f"has {image['height']} x {image['width']} pixels, more than Pillow opens"
    return ""


def category_fault(category: dict[str, Any]) -> str:
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
    return segmentation_fault(annotation.get("segmentation"), sizes[annotation["image_id"]])


def is_whole(value: object) -> bool:
    """Whether it is a whole number that NumPy and the evaluators can hold."""
    return type(value) is int and -(2**63) <= value < 2**63


def _is_id(value: object) -> bool:
    return type(value) is str or is_whole(value)


def _is_number(value: object) -> bool:
    try:
        return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]
    except OverflowError:  # a whole number of hundreds of digits
        return False


def is_names(names: object) -> bool:
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
