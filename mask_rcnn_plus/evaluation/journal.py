"""What an evaluation has found so far, image by image, so that one that was killed can go on."""

import json
import logging
import shutil
import zlib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from detectron2.utils import comm

_logger = logging.getLogger(__name__)


class Journal:
    """A folder of files, one a process, that grow by a line an image.

    A line is its CRC-32, eight hexadecimal digits, and json; the first of a file says what is
    evaluated. A line that a kill cut short, or a file about something else, counts for nothing.

    Attributes:
        kept: what this process got back of an evaluation that did not end: one mapping an image,
            as :meth:`add` was given them. No image is among those of two processes.
        done: the ids of all images that some process got back.
    """

    def __init__(self, folder: Path, fingerprint: str) -> None:
        """Reads what there is; every process must do so.

        Args:
            folder: made where it does not exist.
            fingerprint: of all that an image's result depends on; files with another one are
                deleted.
        """
        self._folder = folder
        self._file: IO[str] | None = None
        self._head = {"fingerprint": comm.all_gather(fingerprint)[0]}
        found = dict(self._read()) if folder.is_dir() else {}
        # Each image goes to the first process that sees it: folders may be shared or not.
        seen = comm.all_gather(set(found))
        before: set[Any] = set().union(*seen[: comm.get_rank()])
        self.kept = [entry for image, entry in found.items() if image not in before]
        self.done: Collection[Any] = set().union(*seen)

    def add(self, entry: Mapping[str, Any]) -> None:
        """Writes what was found on an image.

        Args:
            entry: with "image_id"; whatever json can say.
        """
        if self._file is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            path = self._folder / f"process{comm.get_rank()}.jsonl"
            # A line feed first: what a kill left of a line would swallow the next one.
            self._file = path.open("a", encoding="utf-8")
            self._file.write("\n" + _line(self._head))
        self._file.write(_line(entry))
        self._file.flush()

    def remove(self) -> None:
        """Deletes all files, once the evaluation has ended; every process must call it."""
        if self._file is not None:
            self._file.close()
            self._file = None
        comm.synchronize()
        if comm.get_local_rank() == 0:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _read(self) -> Iterator[tuple[Any, Mapping[str, Any]]]:
        stale = []
        for path in sorted(self._folder.glob("process*.jsonl")):
            entries = list(_entries(path))
            if any(entry != self._head for entry in entries if "fingerprint" in entry):
                stale.append(path)
            elif entries and entries[0] == self._head:
                yield from ((e["image_id"], e) for e in entries if "image_id" in e)
        # Only after all processes have read: another one may be about to find the same.
        comm.synchronize()
        for path in stale:
            path.unlink(missing_ok=True)
        if stale:
            _logger.info(
                "%s is of an evaluation of other weights, settings or images: not used",
                self._folder,
            )


def _line(entry: Mapping[str, Any]) -> str:
    text = json.dumps(entry)
    return f"{zlib.crc32(text.encode()):08x} {text}\n"


def _entries(path: Path) -> Iterator[dict[str, Any]]:
    """The lines that are as they were written."""
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            checksum, _, text = line.rstrip("\n").partition(" ")
            if text and checksum == f"{zlib.crc32(text.encode()):08x}":
                yield json.loads(text)
