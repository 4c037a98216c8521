"""Reads coco_instances_results.json a piece at a time."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from mask_rcnn_plus.errors import UserError

_PIECE = 1 << 20
# Far more than a mask of the largest image takes.
_MOST_OF_AN_ENTRY = 1 << 28


def read_results(path: Path) -> Iterator[tuple[dict[str, Any], float]]:
    """The detections of a file in COCO's result format, in memory of a few MiB.

    Args:
        path: of a json list of objects.

    Yields:
        each detection, and how much of the file is read, from 0 to 1.

    Raises:
        UserError: the file is missing, or no such list.
    """
    try:
        size = max(1, path.stat().st_size)
        with path.open(encoding="utf-8") as file:
            reader = _Reader(file)
            reader.expect("[")
            if reader.next() == "]":
                return
            while True:
                yield reader.entry(), min(1.0, reader.read / size)
                if reader.next() == "]":
                    return
                reader.expect(",")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot read the detections in {path}: {reason}") from error


class _Reader:
    def __init__(self, file: IO[str]) -> None:
        self._file = file
        self._text, self._place = "", 0
        self._decoder = json.JSONDecoder()
        self.read = 0

    def next(self) -> str:
        """The next character that is no space, which stays; "" at the end."""
        while True:
            while self._place < len(self._text):
                if self._text[self._place] not in " \n\r\t":
                    return self._text[self._place]
                self._place += 1
            if not self._fill():
                return ""

    def expect(self, character: str) -> None:
        if self.next() != character:
            raise ValueError(f"there is no '{character}' where a list of detections has one")
        self._place += 1

    def entry(self) -> dict[str, Any]:
        if self.next() != "{":
            raise ValueError("an entry is no object")
        wanted = 0
        while True:
            try:
                entry, self._place = self._decoder.raw_decode(self._text, self._place)
                return entry
            except json.JSONDecodeError:
                # Twice as much as before, that a long entry is not read again too often.
                wanted = 2 * max(1, len(self._text) - self._place)
                while len(self._text) - self._place < wanted:
                    if wanted > _MOST_OF_AN_ENTRY or not self._fill():
                        break
                else:
                    continue
                if len(self._text) - self._place > wanted // 2:
                    continue
                raise

    def _fill(self) -> bool:
        piece = self._file.read(_PIECE)
        self._text, self._place = self._text[self._place :] + piece, 0
        self.read += len(piece)
        return bool(piece)
