"""Reads the detections of an evaluation, with only a few MiB in memory at a time."""

import json
import re
import reprlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from mask_rcnn_plus.data.mask_rules import is_number, mask_fault
from mask_rcnn_plus.errors import UserError, reason
from mask_rcnn_tools.report import files

EVALUATE_AGAIN = "evaluate again with train_net.py --eval-only"
_CHUNK = 1 << 20
_SPACE = re.compile(r"[ \t\n\r]*")
# Characters; far more than the mask of the largest image needs.
_MAX_DETECTION = 1 << 28


def checked_results(path: Path, ground_truth: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The detections of a file, after a check that pycocotools can process them."""
    sizes = {i["id"]: [i["height"], i["width"]] for i in ground_truth["images"]}
    for entry in read_results(path):
        if fault := _fault(entry, sizes):
            raise UserError(f"{path}: a detection {fault}; {EVALUATE_AGAIN}")
        yield entry


def _fault(entry: Mapping[str, Any], sizes: Mapping[Any, list[int]]) -> str:
    score, box, mask = entry.get("score"), entry.get("bbox"), entry.get("segmentation")
    if not {type(entry.get("image_id")), type(entry.get("category_id"))} <= {int, str}:
        return "lacks image_id or category_id"
    if not is_number(score) or not 0 <= score <= 1:
        return f"has the score {reprlib.repr(score)}, expected 0 to 1"
    if box is not None and not files.is_box(box):
        return f"has the bbox {reprlib.repr(box)}, expected [x, y, width, height] in pixels"
    if mask is not None and not isinstance(mask, dict):
        return "has a segmentation that is not a run-length encoding"
    size = sizes.get(entry["image_id"])
    return mask_fault(mask, size) if mask and size else ""


def read_results(path: Path) -> Iterator[dict[str, Any]]:
    """Reads detections in COCO's result format, with only a few MiB in memory at a time.

    Raises:
        UserError: the file is missing, or is not a json list of objects.
    """
    try:
        with path.open(encoding="utf-8") as file:
            yield from _objects(file, path.stat().st_size)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read the detections in {path}: {reason(error)}") from error


def _objects(file: IO[str], size: int) -> Iterator[dict[str, Any]]:
    decode = json.JSONDecoder().raw_decode
    text, position = "", 0

    def fill() -> bool:
        nonlocal text, position
        chunk = file.read(_CHUNK)
        bar.update(len(chunk))
        text, position = text[position:] + chunk, 0
        return bool(chunk)

    def next_character() -> str:
        """The next character that is not white space, without consuming it; "" at the end."""
        nonlocal position
        while True:
            position = _SPACE.match(text, position).end()  # type: ignore[union-attr]
            if position < len(text):
                return text[position]
            if not fill():
                return ""

    def consume(expected: str) -> None:
        nonlocal position
        if next_character() != expected:
            raise ValueError(f"expected '{expected}' in a list of detections")
        position += 1

    with tqdm(
        total=size, desc="reading", unit="B", unit_scale=True, leave=False, disable=None
    ) as bar:
        consume("[")
        if next_character() == "]":
            return
        while True:
            if next_character() != "{":
                raise ValueError("expected a json object for each detection")
            while True:
                try:
                    entry, position = decode(text, position)
                    break
                except json.JSONDecodeError:
                    # Double the text each time, so that a long entry is not decoded too often.
                    length = len(text) - position
                    while len(text) - position < 2 * length and length < _MAX_DETECTION and fill():
                        pass
                    if len(text) - position == length:
                        raise
            yield entry
            if next_character() == "]":
                return
            consume(",")
