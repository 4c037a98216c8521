"""Reads coco_instances_results.json a piece at a time."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mask_rcnn_plus.errors import UserError

_PIECE = 1 << 20


def read_results(path: Path) -> Iterator[tuple[dict[str, Any], float]]:
    """The detections of a file in COCO's result format, in memory of a few MiB.

    Args:
        path: of a json list of objects.

    Yields:
        each detection, and how much of the file is read, from 0 to 1.

    Raises:
        UserError: the file is missing, or no such list.
    """
    decoder = json.JSONDecoder()
    try:
        size = max(1, path.stat().st_size)
        read = 0
        with path.open(encoding="utf-8") as file:
            text = file.read(_PIECE)
            read += len(text)
            place = _skip(text, 0)
            if text[place : place + 1] != "[":
                raise ValueError("not a list")
            place = _skip(text, place + 1)
            while text[place : place + 1] != "]":
                try:
                    entry, end = decoder.raw_decode(text, place)
                    complete = len(text) - end > 1
                except json.JSONDecodeError:
                    complete = False
                if not complete:
                    more = file.read(_PIECE)
                    if not more and not text[place:].rstrip().endswith("]"):
                        raise ValueError("ends in the midst")
                    if not more:
                        entry, end = decoder.raw_decode(text, place)
                    else:
                        text, place = text[place:] + more, 0
                        read += len(more)
                        continue
                if not isinstance(entry, dict):
                    raise ValueError("an entry is no object")
                yield entry, min(1.0, read / size)
                place = _skip(text, end)
                if text[place : place + 1] == ",":
                    place = _skip(text, place + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot read the detections in {path}: {reason}") from error


def _skip(text: str, place: int) -> int:
    while place < len(text) and text[place] in " \n\r\t":
        place += 1
    return place
