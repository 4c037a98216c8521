"""Reads a COCO json and its keypoint metadata, or explains in one line what is wrong with it."""

import colorsys
import json
import logging
import re
import reprlib
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mask_rcnn_plus.data.mask_rules import are_numbers, is_number, mask_fault, max_pixels
from mask_rcnn_plus.errors import UserError, printable, reason

logger = logging.getLogger(__name__)

_show = reprlib.repr  # shortens values of unknown length

# The fields that detectron2 and the evaluator need in each entry of the json's three lists.
_FIELDS = {
    "images": ("id", "file_name", "height", "width"),
    "categories": ("id", "name"),
    "annotations": ("id", "image_id", "category_id", "bbox"),
}


def read_coco_json(path: Path) -> dict[str, Any]:
    """Reads a json and checks that it has COCO's structure.

    Loading relies on this structure: the lists, the fields and types of their entries, unique ids,
    ids that refer to an entry, and masks that are safe for pycocotools. The data check
    (``mask_rcnn_tools.check``) looks for all other problems.

    Raises:
        UserError: the file is missing, unreadable, not json or not COCO. The message names the
            first bad entry by its list, index and id.
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
    """The reason, as a clause, why a json is not in COCO format; "" if its outline is right."""
    if not isinstance(content, dict):
        return f"it contains a {type(content).__name__}, not an object"
    for section in _FIELDS:
        if not isinstance(content.get(section), list):
            return f"the list '{section}' is missing"
    return "" if content["categories"] else "its list 'categories' is empty"


Stamp = tuple[Path, int, int]

# The categories of jsons that the data check has accepted. They are not checked again.
_vetted: dict[Stamp, list[dict[str, Any]]] = {}
# Jsons whose masks are known to be safe.
_harmless: set[Stamp] = set()


def file_stamp(path: Path) -> Stamp | None:
    """A value that changes when the file does; None if the file is missing."""
    try:
        status = path.stat()
    except OSError:
        return None
    return path, status.st_mtime_ns, status.st_size


def mark_vetted(stamp: Stamp, categories: list[dict[str, Any]]) -> None:
    """Records that ``read_coco_json`` accepts a json; the stamp is from before it was read."""
    _vetted[stamp] = categories


def read_categories(path: Path) -> list[dict[str, Any]]:
    """A json's categories. ``read_coco_json`` checks the json, unless it is vetted."""
    stamp = file_stamp(path)
    if stamp is not None and stamp in _vetted:
        return _vetted[stamp]
    return read_coco_json(path)["categories"]


def refuse_harmful_masks(path: Path) -> None:
    """Refuses a json for another package's loader if a mask is unsafe for pycocotools.

    Raises:
        UserError: a mask is unsafe, or the file is not json.
    """
    stamp = file_stamp(path)
    if stamp is None or stamp in _vetted or stamp in _harmless:
        return
    content = parse(path)
    if outline_fault(content):
        return
    sizes: dict[Any, list[Any]] = {
        image["id"]: [image.get("height"), image.get("width")]
        for image in content["images"]
        if isinstance(image, dict) and _is_id(image.get("id"))
    }
    for index, annotation in enumerate(content["annotations"]):
        image_id = annotation.get("image_id") if isinstance(annotation, dict) else None
        size = sizes.get(image_id) if _is_id(image_id) else None
        if size and (fault := mask_fault(annotation.get("segmentation"), size)):
            where = f"annotations[{index}] (id {_show(annotation.get('id'))})"
            raise _not_coco(path, f"{where} {fault}")
    _harmless.add(stamp)


def keypoint_metadata(categories: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """detectron2's keypoint metadata, as far as COCO categories determine it.

    Returns:
        an empty dict if no category names keypoints, or if categories differ in them
        (:func:`keypoint_conflict`). Otherwise
        "keypoint_names"; with a skeleton also "keypoint_connection_rules", a list of (name, name,
        RGB colour); and if all names with "left" or "right" come in pairs also
        "keypoint_flip_map", the pairs of names that swap in a mirrored image. If no name contains
        left or right, the user must set that map.
    """
    named = [c for c in categories if c.get("keypoints")]
    if not named:
        return {}
    if conflict := keypoint_conflict(named):
        logger.warning(f"No keypoint metadata is set: {conflict}")
        return {}
    names = named[0]["keypoints"]
    metadata: dict[str, Any] = {"keypoint_names": list(names)}
    links = named[0].get("skeleton")
    if isinstance(links, list) and links and all(_is_link(link, len(names)) for link in links):
        metadata["keypoint_connection_rules"] = [
            (names[first - 1], names[second - 1], _colour(index / len(links)))
            for index, (first, second) in enumerate(links)
        ]
    sided = {name: _mirrored(name) for name in names if _mirrored(name) != name}
    if sided and len(set(names)) == len(names) and all(other in sided for other in sided.values()):
        metadata["keypoint_flip_map"] = [
            (name, other) for name, other in sided.items() if names.index(name) < names.index(other)
        ]
    return metadata


def keypoint_conflict(categories: Sequence[dict[str, Any]]) -> str:
    """The reason, as a sentence, why categories do not share one list of keypoints; "" if they do.

    A model predicts one list of keypoints for all classes. Categories without any do not count.
    """
    named = [c for c in categories if c.get("keypoints")]
    for category in named:
        names = category["keypoints"]
        if not is_names(names):
            return f"category {_show(category.get('name'))} has the keypoints {_show(names)}"
        if names != (first := named[0])["keypoints"]:
            pairs = ((c.get("name"), c["keypoints"]) for c in (first, category))
            lists = (f"{_show(name)} has {len(n)} ({', '.join(n)[:80]})" for name, n in pairs)
            return f"categories differ in their keypoints: {printable(', '.join(lists))}"
    return ""


def parse(path: Path) -> Any:
    """A json's content, of any type; raises a UserError if the file is not readable json."""
    if not path.is_file():
        raise UserError(f"there is no file '{path}'")
    try:
        with path.open("rb") as file:  # json recognises UTF-8, 16 and 32, with or without a mark
            return json.load(file)
    except OSError as error:
        raise UserError(f"'{path}' cannot be read: {reason(error)}") from error
    except UnicodeDecodeError as error:
        where = f"byte {error.object[error.start]:#x} at position {error.start}"
        raise UserError(
            f"'{path}' is not valid json: it is not in UTF-8 ({where}); save it as UTF-8"
        ) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"'{path}' is not valid json: {reason(error)}") from error


def _not_coco(path: Path, fault: str) -> UserError:
    return UserError(f"'{path}' is not in COCO format: {fault}; see datasets/README.md")


def _check_entries(
    path: Path, section: str, entries: list[Any], fields: tuple[str, ...]
) -> set[int | str]:
    """Checks that all fields are there and the ids are valid and unique, and returns the ids."""
    ids: set[int | str] = set()
    for index, entry in enumerate(entries):
        where = f"{section}[{index}]"
        if not isinstance(entry, dict):
            raise _not_coco(path, f"{where} is a {type(entry).__name__}, not an object")
        for field in fields:
            if field not in entry:
                needs = ", ".join(f"'{name}'" for name in fields)
                raise _not_coco(path, f"{where} lacks '{field}' (required: {needs})")
        identity = entry["id"]
        if not _is_id(identity):
            raise _not_coco(path, f"{where} has the id {_show(identity)}; an id must be an integer")
        if identity in ids:
            raise _not_coco(path, f"{where} repeats the id {_show(identity)} of an earlier entry")
        ids.add(identity)
    if len({type(identity) for identity in ids}) > 1:
        raise _not_coco(path, f"the ids in '{section}' are partly numbers and partly strings")
    return ids


def image_fault(image: dict[str, Any]) -> str:
    """Describes, as a clause, an error in an image's file name or size; "" if there is none."""
    if not isinstance(image["file_name"], str) or not image["file_name"]:
        return f"has the file_name {_show(image['file_name'])}, which is not a file name"
    for side in ("height", "width"):
        if type(image[side]) is not int or image[side] < 1:
            return f"has the {side} {_show(image[side])}, which is not a number of pixels"
    if image["height"] * image["width"] > max_pixels():
        size = f"{image['height']} x {image['width']} pixels"
        return f"has {size}, above the limit of {max_pixels():,} (INPUT.MAX_PIXELS, --max-pixels)"
    return ""


def category_fault(category: dict[str, Any]) -> str:
    """Describes, as a clause, an error in a category's name; "" if there is none."""
    name = category["name"]
    if not isinstance(name, str):
        return f"has the name {_show(name)}, which is not a string: write it in quotes"
    if any("\ud800" <= character <= "\udfff" for character in name):
        return f"has the name {_show(name)}, which is not valid Unicode"
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
    if not are_numbers(box, 4) or not all(map(is_number, box)):
        return f"has the bbox {_show(box)}, which is not [x, y, width, height] in pixels"
    if crowd_flag(annotation.get("iscrowd")) is None:
        return f"has the iscrowd {_show(annotation['iscrowd'])}, which is neither 0 nor 1"
    return mask_fault(annotation.get("segmentation"), sizes[annotation["image_id"]])


def folded(name: str) -> str:
    """A class name without differences in case, spaces and Unicode form."""
    return "".join(unicodedata.normalize("NFKC", name).casefold().split())


def crowd_flag(value: object) -> int | None:
    """The meaning of an annotation's ``iscrowd``: 0 or 1.

    Tools also write false, 0.0 or null. None is returned for any other value.
    """
    plain = value is None or isinstance(value, int | float)  # also true and false
    return int(bool(value)) if plain and value in (None, 0, 1) else None


def lenient_flag(value: Any) -> int:
    """As :func:`crowd_flag`, but also for text and lists: 0 for "0", "false" and empty ones."""
    return int(value not in (0, None, "", "0", "false", "False", [], {}))


def is_whole(value: object) -> bool:
    """Whether a value is an integer of at most 64 bits, as NumPy and the evaluators need."""
    return type(value) is int and -(2**63) <= value < 2**63


def _is_id(value: object) -> bool:
    return type(value) is str or is_whole(value)


def is_names(names: object) -> bool:
    """Whether a value is a list of strings."""
    return isinstance(names, list) and all(isinstance(name, str) for name in names)


def _is_link(link: object, count: int) -> bool:
    """Whether a value is a pair of keypoint numbers, counted from 1."""
    if not isinstance(link, list) or len(link) != 2:
        return False
    return all(type(end) is int and 1 <= end <= count for end in link)


def _mirrored(name: str) -> str:
    """The name with left and right exchanged, but not within words such as "bright"."""
    swap = {"left": "right", "right": "left", "Left": "Right", "Right": "Left"}
    return re.sub("(?<![a-z])(?:left|right)|Left|Right", lambda match: swap[match[0]], name)


def _colour(hue: float) -> tuple[int, int, int]:
    red, green, blue = (round(255 * part) for part in colorsys.hsv_to_rgb(hue, 0.8, 1.0))
    return red, green, blue
