"""Where the images of a json lie, without a look at anything outside their folder."""

import os
import stat
from pathlib import Path
from typing import NamedTuple


class Place(NamedTuple):
    """Where an image lies.

    Attributes:
        path: the file, or "" where it may not or cannot be opened.
        kind: the kind of problem, or "".
        detail: as in ``Problem``.
        size, mtime_ns: of the file, in bytes and nanoseconds.
    """

    path: str
    kind: str = ""
    detail: str = ""
    size: int = 0
    mtime_ns: int = 0


class Finder:
    """Finds images below a folder; each folder is listed once.

    Args:
        root: the folder. It may be a link itself.
    """

    def __init__(self, root: Path) -> None:
        self._root = os.path.realpath(root)
        # Folder -> (its real path, its entries), or None where it leaves the root.
        self._folders: dict[str, tuple[str, dict[str, os.DirEntry[str]]] | None] = {}

    def find(self, name: str) -> Place:
        """Where the image lies.

        Args:
            name: its file_name in the json.
        """
        if "\0" in name or any("\ud800" <= character <= "\udfff" for character in name):
            return Place("", "file-missing", "has a file_name that no file can have")
        if "://" in name or ".." in Path(name).parts:
            return Place("", "file-outside", "has a file_name that leads out of the image folder")
        folder, base = os.path.split(Path(self._root, name))  # of an absolute name, itself
        if folder not in self._folders:
            self._folders[folder] = self._list(folder)
        listing = self._folders[folder]
        if listing is None:
            return Place("", "file-outside", "has a file_name that leads out of the image folder")
        real, entries = listing
        entry = entries.get(base)
        if entry is None:
            return self._odd_name(f"{real}/{base}")
        try:
            if entry.is_symlink():
                return self._odd_name(entry.path)
            return self._regular(entry.path, entry.stat(follow_symlinks=False))
        except OSError as error:
            return Place("", "file-unreadable", f"cannot be looked at: {error.strerror}")

    def _list(self, folder: str) -> tuple[str, dict[str, os.DirEntry[str]]] | None:
        real = os.path.realpath(folder)
        if not self._is_inside(real):
            return None
        try:
            with os.scandir(real) as entries:
                return real, {entry.name: entry for entry in entries}
        except OSError:
            return real, {}

    def _odd_name(self, path: str) -> Place:
        """A link, or a name that the listing spells differently (case, Unicode)."""
        try:
            real = os.path.realpath(path, strict=True)
            if not self._is_inside(real):
                return Place("", "file-outside", "is a link that leads out of the image folder")
            return self._regular(real, Path(real).lstat())
        except (OSError, ValueError):
            return Place("", "file-missing", f"is not in '{Path(path).parent}'")

    def _is_inside(self, real: str) -> bool:
        return real == self._root or real.startswith(self._root.rstrip(os.sep) + os.sep)

    @staticmethod
    def _regular(path: str, status: os.stat_result) -> Place:
        if not stat.S_ISREG(status.st_mode):
            return Place("", "file-unreadable", "is no ordinary file")
        return Place(path, size=status.st_size, mtime_ns=status.st_mtime_ns)
