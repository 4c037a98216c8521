"""Finds the image file that a name in a label file refers to.

Label files are moved, renamed and uploaded: their names have folders of another machine, drive
letters, other capitals, another Unicode form, or the prefix of an upload. A name is resolved only
if exactly one file fits.
"""

import contextlib
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path
from urllib.parse import unquote

_ENDINGS = {"jpeg": "jpg", "jpe": "jpg", "jfif": "jpg", "tiff": "tif"}


def _unicode_form(path: str) -> str:
    return unicodedata.normalize("NFC", path)


def _ignoring_case(path: str) -> str:
    """Without differences in case, and with one ending for JPEG and one for TIFF."""
    stem, dot, ending = _unicode_form(path).casefold().rpartition(".")
    return stem + dot + _ENDINGS.get(ending, ending)


def _without_upload(path: str) -> str:
    """Without URL escapes, and without what Label Studio (``1a2b3c4d-NAME.jpg``) and Roboflow
    (``NAME_jpg.rf.HASH.jpg``) add to a name.
    """
    folder, slash, name = _ignoring_case(unquote(path)).rpartition("/")
    name = re.sub(r"^(?=\d*[a-f])[0-9a-f]{8}-(?=.)", "", name)  # with a letter: not a date
    name = re.sub(r"[_.](?:jpe?g|png|bmp|tiff?|webp)\.rf\.[0-9a-z]{16,}(?=\.)", "", name)
    return folder + slash + name


def similar_name(stem: str) -> str:
    """A key that is equal for names, without ending, that the rules below treat as one file."""
    return _without_upload(f"{stem}.")


# How a name differs from its file -> a function that makes both equal. The first one that finds a
# file is used.
_RULES: dict[str, Callable[[str], str]] = {
    "in another folder": str,
    "in another Unicode form": _unicode_form,
    "with other capitals or another ending (.jpg, .jpeg)": _ignoring_case,
    "without the prefix, hash or URL escapes of an upload": _without_upload,
}


class ImageFiles:
    """Finds the files of names in label files. Lists the folders only if a name is not exact.

    Args:
        roots: the folders. A file outside them is never found, whatever the name says.

    Attributes:
        resolved: how a name differs from its file -> "NAME: FILE" of each such name, once.
        ambiguous: name -> the files that it fits, if there are several.
    """

    def __init__(self, *roots: Path) -> None:
        self.resolved: dict[str, list[str]] = {}
        self.ambiguous: dict[str, list[Path]] = {}
        self._roots = [Path(os.path.realpath(root)) for root in roots]
        self._found: dict[tuple[str, Path], Path | None] = {}
        # For each rule: the last part of a path, as the rule changes it -> files.
        self._by_name: dict[str, dict[str, list[Path]]] = {}

    def find(self, name: str, near: Path | None = None) -> Path | None:
        """The file that a name means, with its real path; None if it fits no file, or several.

        Args:
            name: relative or absolute, of any system.
            near: the folder that the name is relative to, if it is not the first root.
        """
        try:
            # UTF-8 as os.listdir returns it in this locale, perhaps with surrogates.
            name = os.fsdecode(name.encode("utf-8", "surrogateescape"))
        except UnicodeError:
            return None
        bases = [*([Path(os.path.realpath(near))] if near else []), *self._roots]
        key = (name, bases[0])
        if key not in self._found:
            self._found[key] = self.find_exact(name, near) or self._find_similar(name, bases)
        return self._found[key]

    def find_exact(self, name: str, near: Path | None = None) -> Path | None:
        """As ``find``, but only if a file has exactly this name."""
        name = name.replace("\\", "/")
        try:
            for base in [near, *self._roots] if near else self._roots:
                path = Path(os.path.realpath(base / name))
                if self._is_inside(path) and path.is_file():
                    return path
        except (OSError, ValueError):  # too long, a NUL, half of a surrogate pair
            pass
        return None

    def name_of(self, path: Path) -> str:
        """The path of a found file relative to its root, with "/" between folders."""
        root = next(root for root in self._roots if path.is_relative_to(root))
        return path.relative_to(root).as_posix()

    def _find_similar(self, name: str, bases: list[Path]) -> Path | None:
        for how, rule in _RULES.items():
            wanted = _parts(rule(name.replace("\\", "/")))
            files = self._files(how).get(wanted[-1], []) if wanted else []
            for base in bases:
                fitting: dict[int, list[Path]] = {}
                for file in files:
                    if not file.is_relative_to(base):
                        continue
                    parts = _parts(rule(file.relative_to(base).as_posix()))
                    common = min(len(parts), len(wanted))
                    # One path must be the end of the other: "val/1.jpg" is not "train/1.jpg".
                    if parts[-common:] == wanted[-common:]:
                        fitting.setdefault(common, []).append(file)
                if fitting:
                    best = fitting[max(fitting)]
                    if len(best) > 1:
                        self.ambiguous[name] = best
                        return None
                    self.resolved.setdefault(how, []).append(f"{name}: {best[0]}")
                    return Path(os.path.realpath(best[0]))
        return None

    def _files(self, how: str) -> dict[str, list[Path]]:
        """All files by the last part of their path, as a rule changes it."""
        if how not in self._by_name:
            files = self._by_name[how] = {}
            for file in self._all_files:
                files.setdefault(_RULES[how](file.name), []).append(file)
        return self._by_name[how]

    @cached_property
    def _all_files(self) -> list[Path]:
        """The files in the roots, sorted, except hidden ones."""
        files = set()
        for root in self._roots:
            for folder, folders, names in os.walk(root):
                folders[:] = [name for name in folders if not name.startswith(".")]
                files |= {Path(folder, name) for name in names if not name.startswith(".")}
        return sorted(
            file
            for file in files
            if not file.is_symlink() or self._is_inside(Path(os.path.realpath(file)))
        )

    def _is_inside(self, path: Path) -> bool:
        return any(path.is_relative_to(root) for root in self._roots)


def _parts(path: str) -> list[str]:
    """The parts of a path, without "..", a drive, or a URL's scheme and host."""
    path = re.sub(r"^(?:[a-z]:|[a-z]+://[^/]*)", "", path, flags=re.IGNORECASE)
    return [part for part in path.split("/") if part not in ("", ".", "..")]


def missing_files(paths: Iterable[str]) -> list[str]:
    """The paths where no file exists, each once. Lists folders, which is faster than many stats."""
    paths = list(dict.fromkeys(paths))
    listed: set[str] = set()
    for folder in {os.path.split(path)[0] for path in paths}:
        with contextlib.suppress(OSError, ValueError), os.scandir(folder) as entries:
            listed.update(entry.path for entry in entries)
    # The listing may spell a name differently (case, Unicode); the file system decides.
    unlisted = (path for path in paths if path not in listed and "://" not in path)
    return [path for path in unlisted if not _exists(path)]


def _exists(path: str) -> bool:
    try:
        Path(path).stat()
    except (OSError, ValueError):  # absent, too long, a NUL, half of a surrogate pair
        return False
    return True


def relative_name(path: str, root: str | Path) -> str:
    """A path relative to the root; unchanged if it is not below the root."""
    return path.removeprefix(f"{root}".rstrip("/") + "/")


def as_text(path: str) -> str:
    """The path as a json contains it. With LC_ALL=C, Python escapes letters in file names."""
    return os.fsencode(path).decode("utf-8", "surrogateescape")


def resolve_names(names: Iterable[str], root: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Finds the images of a data set whose file does not exist under the name in the json.

    Args:
        names: the ``file_name`` of each image, relative to the root or absolute.
        root: the image folder.

    Returns:
        name -> the path of its file, relative to the root; and name -> the reason, as a clause, why
        it has no file: several files fit, or the file is that of another image.
    """
    paths = {str(Path(root, name)): name for name in names}
    lost = [paths[path] for path in missing_files(paths)]
    if not lost:
        return {}, {}
    files = ImageFiles(root)
    found: dict[str, str] = {}
    for name in lost:
        if (file := files.find(name)) is not None:
            found[name] = files.name_of(file)
    doubts = {
        name: f"could be any of {', '.join(repr(files.name_of(path)) for path in fitting[:3])}"
        for name, fitting in files.ambiguous.items()
    }
    present = (relative_name(path, root) for path, name in paths.items() if name not in set(lost))
    uses = Counter([*found.values(), *map(os.path.normpath, present)])
    for name, path in found.items():
        if uses[path] > 1:
            doubts[name] = f"could be '{path}', but so could another image"
    return {name: path for name, path in found.items() if name not in doubts}, doubts
