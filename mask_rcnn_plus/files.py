"""Writes files completely or not at all."""

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any


@contextlib.contextmanager
def replacing(path: Path, mode: str = "w", **options: Any) -> Iterator[IO[Any]]:
    """Opens a temporary file that replaces ``path`` when the block ends without an error.

    Args:
        path: the file. Readers see the old or the new content, never a part. Its folder must exist.
        mode: "w" for text in UTF-8, "wb" for bytes.
        options: further arguments of ``open``.

    Raises:
        OSError: the file cannot be written. The old one is unchanged.
    """
    part = path.with_name(f"{path.name}.part")
    try:
        with part.open(mode, encoding=None if "b" in mode else "utf-8", **options) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException as error:
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)
        with contextlib.suppress(OSError):
            part.unlink()
        raise


def file_digest(path: Path, algorithm: str = "sha256") -> str:
    """The hexadecimal digest of a file, by an algorithm of ``hashlib``."""
    total = hashlib.new(algorithm, usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            total.update(block)
    return total.hexdigest()
