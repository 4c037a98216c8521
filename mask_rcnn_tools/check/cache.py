"""What was found out before, in the user's cache folder: losing it costs time alone."""

import contextlib
import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

# Raised with every change of what is found or kept.
VERSION = 1


def cache_folder() -> Path:
    """$MASK_RCNN_PLUS_CACHE, else mask_rcnn_plus in $XDG_CACHE_HOME, else in ~/.cache."""
    own = os.environ.get("MASK_RCNN_PLUS_CACHE")
    if own:
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    return Path(base or "~/.cache", "mask_rcnn_plus").expanduser()


def hash_file(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal digits.

    Raises:
        OSError: the file cannot be read.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def load(name: str) -> Any:
    """What was saved under a name, or None."""
    try:
        found = json.loads((cache_folder() / name).read_text())
        return found["value"] if found["version"] == VERSION else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def save(name: str, value: Any) -> None:
    """Keeps a value that json can hold, if the cache can be written."""
    with contextlib.suppress(OSError, ValueError, TypeError):
        write_whole(cache_folder() / name, json.dumps({"version": VERSION, "value": value}))


def write_whole(path: Path, text: str) -> None:
    """Writes a file so that nobody ever sees a part of it, and makes its folder.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, part = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        os.close(handle)
        Path(part).write_text(text, encoding="utf-8")
        Path(part).replace(path)
    except BaseException:
        Path(part).unlink()
        raise


class ImageCache:
    """What is known of the image files of a folder, each as long as its size and time stay.

    Args:
        root: the folder.
    """

    def __init__(self, root: Path) -> None:
        digest = hashlib.sha256(os.path.realpath(root).encode("utf-8", "surrogateescape"))
        self._name = f"images-{digest.hexdigest()[:24]}.json"
        found = load(self._name)
        self._known: dict[str, list[Any]] = found if isinstance(found, dict) else {}
        self._changed = False

    def get(self, path: str, size: int, mtime_ns: int) -> list[Any] | None:
        """The facts put in for the file, if it has not changed since."""
        known = self._known.get(path)
        if not isinstance(known, list) or known[:2] != [size, mtime_ns]:
            return None
        return known[2:]

    def put(self, path: str, size: int, mtime_ns: int, facts: list[Any]) -> None:
        """Keeps facts that json can hold."""
        self._known[path] = [size, mtime_ns, *facts]
        self._changed = True

    def save(self) -> None:
        """Writes what is new."""
        if self._changed:
            save(self._name, self._known)
            self._changed = False
