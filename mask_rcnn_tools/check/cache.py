"""Results of earlier checks, in the user's cache folder. Deleting them only costs time."""

import contextlib
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from mask_rcnn_tools.files import write_atomically

# Increase this number whenever the results or their format change.
VERSION = 3


def cache_folder() -> Path:
    """$MASK_RCNN_PLUS_CACHE, or mask_rcnn_plus in $XDG_CACHE_HOME, or in ~/.cache."""
    if own := os.environ.get("MASK_RCNN_PLUS_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "mask_rcnn_plus").expanduser()


def hash_file(path: str | Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal.

    Raises:
        OSError: the file cannot be read.
    """
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def load(name: str) -> Any:
    """The value saved under a name, or None."""
    try:
        saved = json.loads((cache_folder() / name).read_text())
        return saved["value"] if saved["version"] == VERSION else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def save(name: str, value: Any) -> None:
    """Saves a value that JSON can represent, if the cache folder is writable."""
    with contextlib.suppress(OSError, ValueError, TypeError):
        write_atomically(cache_folder() / name, json.dumps({"version": VERSION, "value": value}))


class ImageCache:
    """Facts about the image files of a folder; each is valid until the file's size or time changes.

    Args:
        root: the folder.
    """

    def __init__(self, root: Path) -> None:
        digest = hashlib.sha256(os.path.realpath(root).encode("utf-8", "surrogateescape"))
        self._name = f"images-{digest.hexdigest()[:24]}.json"
        saved = load(self._name)
        self._facts: dict[str, list[Any]] = saved if isinstance(saved, dict) else {}

    def get(self, path: str, size: int, mtime_ns: int) -> list[Any] | None:
        """The facts about a file, or None if the file is new or has changed."""
        facts = self._facts.get(path)
        if not isinstance(facts, list) or facts[:2] != [size, mtime_ns]:
            return None
        return facts[2:]

    def put(self, path: str, size: int, mtime_ns: int, facts: list[Any]) -> None:
        """Stores facts that JSON can represent."""
        self._facts[path] = [size, mtime_ns, *facts]

    def save(self) -> None:
        """Writes the facts to the cache folder."""
        save(self._name, self._facts)
