"""Saves the results of an evaluation image by image, so that a killed evaluation can resume."""

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
    """A folder with one file per process; each image adds one line.

    A line has its CRC-32 (eight hexadecimal digits) and json. The first line of a file identifies
    the evaluation. Truncated lines and files of other evaluations are ignored.

    Attributes:
        kept: the results of an interrupted evaluation that this process recovered: one mapping per
            image, as given to :meth:`add`. Processes do not share images.
        done: the ids of all images that any process recovered.
    """

    def __init__(self, folder: Path, fingerprint: str) -> None:
        """Reads the existing files; every process must call it.

        Args:
            folder: created if missing.
            fingerprint: identifies everything that an image's result depends on; files with another
                fingerprint are deleted.
        """
        self._folder = folder
        self._file: IO[str] | None = None
        self._head = {"fingerprint": comm.all_gather(fingerprint)[0]}
        entries = dict(self._read()) if folder.is_dir() else {}
        # Each image belongs to the first process that has it, since processes may share the folder.
        seen = comm.all_gather(set(entries))
        earlier: set[Any] = set().union(*seen[: comm.get_rank()])
        self.kept = [entry for image, entry in entries.items() if image not in earlier]
        self.done: Collection[Any] = set().union(*seen)

    def add(self, entry: Mapping[str, Any]) -> None:
        """Writes the result of an image: JSON-serialisable, with "image_id"."""
        if self._file is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            path = self._folder / f"process{comm.get_rank()}.jsonl"
            self._file = path.open("a", encoding="utf-8")
            # The line feed ends a truncated line, which would otherwise absorb the next line.
            self._file.write("\n" + _line(self._head))
        self._file.write(_line(entry))
        self._file.flush()

    def remove(self) -> None:
        """Deletes all files once the evaluation has ended; every process must call it."""
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
        # Delete only after all processes have read the files.
        comm.synchronize()
        for path in stale:
            path.unlink(missing_ok=True)
        if stale:
            _logger.info(
                "%s belongs to an evaluation with other weights, settings or images: ignored",
                self._folder,
            )


def _line(entry: Mapping[str, Any]) -> str:
    text = json.dumps(entry)
    return f"{zlib.crc32(text.encode()):08x} {text}\n"


def _entries(path: Path) -> Iterator[dict[str, Any]]:
    """The intact lines of a file."""
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            checksum, _, text = line.rstrip("\n").partition(" ")
            if text and checksum == f"{zlib.crc32(text.encode()):08x}":
                yield json.loads(text)
