"""Files that have reached the disk when a call returns, and the digest of what was written."""

import contextlib
import hashlib
import os
from pathlib import Path
from typing import Any

PART = ".part"  # ends the temporary names
_BLOCK = 1 << 20


class HashingWriter:
    """Gives torch.save a file, the digest of whose bytes is known at the end.

    Its C++ code does not survive an exception from ``write``: the first is kept instead.
    """

    def __init__(self, file: Any) -> None:
        self._file = file
        self._hash = hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        if self.error is None:
            try:
                self._file.write(data)
                self._hash.update(data)
            except OSError as error:
                self.error = error
        return len(data)

    def flush(self) -> None:
        """Nothing: the file is flushed once, at its end."""

    def digest(self) -> str:
        return self._hash.hexdigest()


def write_small(path: Path, text: str) -> None:
    """Replaces a small file, which is the old one or the new one at any moment."""
    part = path.with_name(path.name + PART)
    try:
        with part.open("w") as file:
            file.write(text)
            to_disk(file)
        part.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            part.unlink()
        raise


def to_disk(file: Any) -> None:
    """Waits until the disk has what was written to an open file."""
    file.flush()
    os.fsync(file.fileno())
    if hasattr(os, "posix_fadvise"):
        # So that reading it again reads the disk.
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def sync_folder(folder: Path) -> None:
    """Waits until the disk has the names in a folder."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def file_digest(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    total = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            total.update(block)
    return total.hexdigest()
