"""Mends a json: drops what cannot be used, puts right what can be known."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from mask_rcnn_plus.data.coco_json import is_whole
from mask_rcnn_tools.check.inspection import inspect
from mask_rcnn_tools.check.mending import ACTIONS, corners, polygon_box
from mask_rcnn_tools.check.problems import ERROR, KINDS, Problem

_PASSES = 6  # what is mended may show what was hidden behind it

_SECTIONS = ("images", "annotations", "categories")


@dataclass(frozen=True)
class Repaired:
    """A mended json.

    Attributes:
        content: the json's.
        changes: how many problems of each kind were acted upon.
        before, after: entries in each list.
        left: errors that remain, since nothing can be done about them.
    """

    content: dict[str, Any]
    changes: Counter[str]
    before: dict[str, int]
    after: dict[str, int]
    left: list[Problem]

    def text(self) -> str:
        """The json."""
        return json.dumps(self.content)

    def summary(self) -> str:
        """What has changed, as one line."""
        counts = ", ".join(
            f"{self.after[section]} of {self.before[section]} {section}" for section in _SECTIONS
        )
        kinds = ", ".join(f"{count} {kind}" for kind, count in self.changes.items())
        return f"keeps {counts}; mended: {kinds or 'nothing'}"


def repair(
    content: dict[str, Any],
    problems: Iterable[Problem],
    sizes: Mapping[int, tuple[int, int]],
) -> Repaired:
    """Mends a json's content.

    Args:
        content: of a json in COCO's outline; changed in place.
        problems: all that were found, those of the image files included.
        sizes: (height, width) of image files that could be read, by the image's index.

    Returns:
        the mended content; checked again, it has no error but those named as left.
    """
    before = {section: len(content[section]) for section in _SECTIONS}
    changes: Counter[str] = Counter()
    left: list[Problem] = []
    current = list(problems)
    for _ in range(_PASSES):
        mended = _Mender(content, sizes).run(current)
        changes += mended
        sizes = {}  # the indices have moved, and what they said has been done
        current = inspect(content).problems
        left = [problem for problem in current if KINDS[problem.kind].severity == ERROR]
        if not mended:
            break
    after = {section: len(content[section]) for section in _SECTIONS}
    return Repaired(content, changes, before, after, left)


class _Mender:
    """One pass over the problems of a content."""

    def __init__(self, content: dict[str, Any], sizes: Mapping[int, tuple[int, int]]) -> None:
        self._content = content
        self._sizes = sizes
        self._dropped: dict[str, set[int]] = {section: set() for section in _SECTIONS}
        self._images = {
            image["id"]: image for image in reversed(content["images"]) if _has_id(image)
        }
        self._categories = {c["id"] for c in content["categories"] if _has_id(c)}
        self._next_id: dict[str, int] = {}

    def run(self, problems: Iterable[Problem]) -> Counter[str]:
        """Acts on the problems; returns how many of each kind were acted upon."""
        changes: Counter[str] = Counter()
        renamed: set[str] = set()
        seen: set[tuple[str, str, int]] = set()
        for problem in problems:
            key = (problem.kind, problem.section, problem.position)
            if not KINDS[problem.kind].mended or not problem.section:
                continue
            changes[problem.kind] += 1
            if problem.kind == "id-type":
                renamed.add(problem.section)
            elif key not in seen and problem.position not in self._dropped[problem.section]:
                seen.add(key)
                self._mend(problem)
        self._drop()
        for section in sorted(renamed):
            self._number(section)
        return changes

    def _mend(self, problem: Problem) -> None:
        entry = self._content[problem.section][problem.position]
        action = ACTIONS.get(problem.kind)
        image: dict[str, Any] = {}
        if problem.section == "annotations" and isinstance(entry, dict):
            key = entry.get("image_id")
            image = self._images.get(key, {}) if type(key) in (int, str, float) else {}
        if problem.kind.startswith("id-") and problem.section == "annotations":
            keep = entry["id"] = self._new_id("annotations")
        elif problem.kind in ("unknown-image", "unknown-category"):
            keep = self._refer(entry, problem.kind.removeprefix("unknown-") + "_id")
        elif problem.kind in ("file-size", "image-field"):
            keep = self._resize(problem.position, entry)
        else:
            keep = action is not None and action(entry, image)
        if not keep:
            self._dropped[problem.section].add(problem.position)

    def _new_id(self, section: str) -> int:
        if section not in self._next_id:
            ids: list[Any] = [e.get("id") for e in self._content[section] if isinstance(e, dict)]
            whole: list[int] = [i for i in ids if is_whole(i) and i > 0]
            self._next_id[section] = max(whole, default=0)
            if self._next_id[section] > 2**62:  # no room above
                self._next_id[section] = 2**53
        self._next_id[section] += 1
        return self._next_id[section]

    def _refer(self, annotation: dict[str, Any], field: str) -> bool:
        """Makes a reference "5" to the id 5 that number."""
        number = _as_int(annotation.get(field))
        known = self._images if field == "image_id" else self._categories
        if number is None or not any(one in known for one in (number, str(number))):
            return False
        annotation[field] = number
        return True

    def _resize(self, index: int, image: dict[str, Any]) -> bool:
        """Sets an image's size to its file's, if its annotations can be of that size."""
        size = self._sizes.get(index)
        if size is None or not isinstance(image.get("file_name"), str):
            return False
        for annotation in self._content["annotations"]:
            if isinstance(annotation, dict) and annotation.get("image_id") == image.get("id"):
                box = annotation.get("bbox")
                if isinstance(annotation.get("segmentation"), dict):
                    fits = annotation["segmentation"].get("size") == list(size)
                else:
                    extent = polygon_box(annotation, size) or corners(box)
                    fits = extent is None or (extent[2] <= size[1] + 1 and extent[3] <= size[0] + 1)
                if not fits:
                    return False
        image["height"], image["width"] = size
        return True

    def _drop(self) -> None:
        gone = {
            image.get("id")
            for index in self._dropped["images"]
            if _has_id(image := self._content["images"][index])
        }
        # An image that had the same id stays, and with it the annotations.
        kept = [
            image
            for index, image in enumerate(self._content["images"])
            if index not in self._dropped["images"]
        ]
        gone -= {image["id"] for image in kept if _has_id(image)}
        self._content["images"][:] = kept
        for section in ("annotations", "categories"):
            self._content[section][:] = [
                entry
                for index, entry in enumerate(self._content[section])
                if index not in self._dropped[section]
                and not (
                    section == "annotations"
                    and isinstance(entry, dict)
                    and type(entry.get("image_id")) in (int, str, float)
                    and entry["image_id"] in gone
                )
            ]

    def _number(self, section: str) -> None:
        """Gives whole numbers to the ids of a list that are none, and to what refers to them."""
        entries = [e for e in self._content[section] if isinstance(e, dict)]
        used = {e["id"] for e in entries if is_whole(e.get("id"))}
        new: dict[Any, int] = {}
        for entry in entries:
            old = entry.get("id")
            if is_whole(old) or not _has_id(entry):
                if not is_whole(old):
                    entry["id"] = self._new_id(section)
                continue
            if old not in new:
                number = _as_int(old)
                if number is None or number in used or (section == "annotations" and number == 0):
                    number = self._new_id(section)
                new[old] = number
                used.add(number)
            entry["id"] = new[old]
        field = {"images": "image_id", "categories": "category_id"}.get(section)
        for annotation in self._content["annotations"] if field else ():
            old = annotation.get(field) if isinstance(annotation, dict) else None
            if type(old) in (int, str, float) and not is_whole(old):
                annotation[field] = new.get(old, old)


def _has_id(entry: Any) -> bool:
    return isinstance(entry, dict) and type(entry.get("id")) in (int, str, float)


def _as_int(value: Any) -> int | None:
    """The whole number that a text or float is, from 0 to 2**53."""
    try:
        number = int(value)
    except (ValueError, OverflowError, TypeError):
        return None
    return number if 0 <= number < 2**53 and float(value) == number else None
