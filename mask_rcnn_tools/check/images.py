"""Checks image files: where they are, their size, colours and orientation, whether they decode."""

import hashlib
import os
import stat
import threading
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from PIL import Image

from mask_rcnn_plus.data import formats
from mask_rcnn_plus.data.mask_rules import max_pixels
from mask_rcnn_plus.errors import reason
from mask_rcnn_tools.check.cache import ImageCache, hash_file
from mask_rcnn_tools.check.problems import Problem
from mask_rcnn_tools.progress import progress_bar

SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that swap width and height

_ORIENTATION_TAG = 0x0112
_DEEP_MODES = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")
_ALPHA_MODES = ("RGBA", "LA", "PA", "RGBa", "La")
# Images of more pixels are decoded one at a time, because each may take 4 bytes per pixel.
_LARGE = 2**25
_one_at_a_time = threading.Lock()
_BATCH = 64  # images that a thread reads at once
_ENDS = 4096  # bytes at the beginning and end of a file, compared before the whole file


class ImageEntry(NamedTuple):
    """An image of the json: its index in the list, id, file name, and size in pixels or 0."""

    position: int
    id: Any
    file_name: str
    height: int
    width: int

    def problem(self, kind: str, detail: str) -> Problem:
        """A problem of this image."""
        return Problem(kind, "images", self.position, self.id, self.id, self.file_name, detail)


class Location(NamedTuple):
    """The location of an image file.

    Attributes:
        path: the path of the file; "" if it must not or cannot be opened.
        kind, detail: the problem, as in ``Problem``; "" without one.
        size, mtime_ns: the file's size in bytes, and its modification time.
    """

    path: str
    kind: str = ""
    detail: str = ""
    size: int = 0
    mtime_ns: int = 0


_OUTSIDE = Location("", "file-outside", "has a file_name that leads out of the image folder")


class Finder:
    """Finds image files in a folder, and never outside it. Lists each folder once.

    Args:
        root: the folder. It may itself be a link.
    """

    def __init__(self, root: Path) -> None:
        self._root = os.path.realpath(root)
        # Folder -> (its real path, its entries), or None if it is outside the root.
        self._folders: dict[str, tuple[str, dict[str, os.DirEntry[str]]] | None] = {}

    def find(self, name: str) -> Location:
        """Finds an image by its file_name in the json."""
        if "\0" in name or any("\ud800" <= character <= "\udfff" for character in name):
            return Location("", "file-missing", "has a file_name that no file can have")
        if "://" in name or ".." in Path(name).parts:
            return _OUTSIDE
        folder, base = os.path.split(Path(self._root, name))  # an absolute name replaces the root
        if folder not in self._folders:
            self._folders[folder] = self._list(folder)
        listing = self._folders[folder]
        if listing is None:
            return _OUTSIDE
        real, entries = listing
        entry = entries.get(base)
        if entry is None:
            return self._resolve(f"{real}/{base}")
        try:
            if entry.is_symlink():
                return self._resolve(entry.path)
            return self._check_type(entry.path, entry.stat(follow_symlinks=False))
        except OSError as error:
            return Location("", "file-unreadable", f"cannot be read: {reason(error)}")

    def _list(self, folder: str) -> tuple[str, dict[str, os.DirEntry[str]]] | None:
        real = os.path.realpath(folder)
        if not self._is_inside(real):
            return None
        try:
            with os.scandir(real) as entries:
                return real, {entry.name: entry for entry in entries}
        except OSError:
            return real, {}

    def _resolve(self, path: str) -> Location:
        """Finds a link, or a name that the file system lists in other letters (case, Unicode)."""
        try:
            real = os.path.realpath(path, strict=True)
            if not self._is_inside(real):
                return _OUTSIDE._replace(detail="is a link that leads out of the image folder")
            return self._check_type(real, Path(real).lstat())
        except (OSError, ValueError):
            return Location("", "file-missing", f"is not in '{Path(path).parent}'")

    def _is_inside(self, real: str) -> bool:
        return real == self._root or real.startswith(self._root.rstrip(os.sep) + os.sep)

    @staticmethod
    def _check_type(path: str, status: os.stat_result) -> Location:
        if not stat.S_ISREG(status.st_mode):
            return Location("", "file-unreadable", "is not a regular file")
        return Location(path, size=status.st_size, mtime_ns=status.st_mtime_ns)


class UnreadableFile(Exception):
    """A file that cannot be read; the message is the end of a sentence: "is an empty file".

    Attributes:
        kind: the kind of problem.
    """

    def __init__(self, detail: str, kind: str = "file-unreadable") -> None:
        super().__init__(detail)
        self.kind = kind


def open_image(file: Path | BinaryIO) -> Image.Image:
    """Opens an image of a supported format, without decoding it.

    Raises:
        UnreadableFile: it is not an image, or has too many pixels.
    """
    try:
        return formats.open_image(file)
    except Image.DecompressionBombError as error:
        raise UnreadableFile(formats.too_many_pixels(error), "file-bomb") from error
    except Image.UnidentifiedImageError as error:
        path = file if isinstance(file, Path) else str(getattr(file, "name", ""))
        hint = formats.conversion_hint(path)
        raise UnreadableFile(
            f"is not an image of a supported format{' (' + hint + ')' if hint else ''}"
        ) from error
    except Exception as error:  # Pillow's plug-ins raise many types of errors
        raise UnreadableFile(f"cannot be read: {reason(error, 120)}") from error


def exif_orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 if it is missing or damaged, as in detectron2."""
    try:
        orientation = image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # whatever parsing damaged EXIF data raises
        return 1
    return orientation if orientation in range(1, 9) else 1


class Facts(NamedTuple):
    """The facts that the check knows about an image file.

    Attributes:
        kind, detail: the problem of the file itself, as in ``Problem``; "" without one.
        width, height: in pixels as stored, before the EXIF orientation; 0 if unknown.
        mode: Pillow's colour mode.
        alpha: whether the image has transparency.
        orientation: EXIF's, 1 to 8.
        decoded: whether the whole file was read.
    """

    kind: str = ""
    detail: str = ""
    width: int = 0
    height: int = 0
    mode: str = ""
    alpha: bool = False
    orientation: int = 1
    decoded: bool = False

    def seen(self) -> tuple[int, int]:
        """(width, height) of the upright image."""
        stored = (self.width, self.height)
        return stored[::-1] if self.orientation in SIDEWAYS else stored


def read_facts(path: str, *, decode: bool) -> Facts:
    """Reads an image file's header. Whatever the file is, this raises no exception.

    Args:
        path: a regular file.
        decode: reads the whole file, unless it has too many pixels.
    """
    try:
        if not Path(path).stat().st_size:
            raise UnreadableFile("is an empty file")
        with Path(path).open("rb") as file, open_image(file) as image:
            alpha = image.mode in _ALPHA_MODES or "transparency" in image.info
            orientation = exif_orientation(image)
            facts = Facts("", "", *image.size, image.mode, alpha, orientation, decode)
            if decode:
                large = facts.width * facts.height > _LARGE
                try:
                    with _one_at_a_time if large else nullcontext():
                        image.load()
                except Exception as error:  # Pillow's plug-ins raise many types of errors
                    detail = f"cannot be decoded: {reason(error, 120)}"
                    return facts._replace(kind="file-truncated", detail=detail)
            return facts
    except UnreadableFile as error:
        return Facts(error.kind, str(error), decoded=decode)
    except Exception as error:
        return Facts("file-unreadable", f"cannot be read: {reason(error, 120)}", decoded=decode)


def check_images(
    entries: Sequence[ImageEntry], root: Path, *, mode: str
) -> tuple[list[Problem], dict[int, tuple[int, int]]]:
    """Checks image files. What it reads is cached.

    Args:
        entries: the images.
        root: the folder that the file names are relative to; no file outside is opened.
        mode: "none" only looks for the files, "headers" reads their headers, "decode" reads them
            completely.

    Returns:
        the problems; and (height, width) as the model sees the image, after the EXIF orientation,
        by position, for each image whose header is readable.
    """
    finder, cache = Finder(root), ImageCache(root)
    problems: list[Problem] = []
    located: list[tuple[ImageEntry, str]] = []
    facts: dict[str, Facts] = {}
    unread: dict[str, Location] = {}
    for entry in entries:
        location = finder.find(entry.file_name)
        path = location.path
        if location.kind:
            problems.append(entry.problem(location.kind, location.detail))
        elif mode != "none":
            located.append((entry, path))
            cached = cache.get(path, location.size, location.mtime_ns)
            known = Facts(*cached) if cached and len(cached) == len(Facts._fields) else None
            if known and (known.decoded or mode == "headers") and _within_limit(known):
                facts[path] = known
            else:
                unread[path] = location
    for path, read in zip(unread, _read_all(list(unread), mode), strict=True):
        facts[path] = read
        cache.put(path, unread[path].size, unread[path].mtime_ns, list(read))
    if unread:
        cache.save()

    sizes = {}
    for entry, path in located:
        fact = facts[path]
        problems += [entry.problem(*fault) for fault in _faults(entry, fact)]
        if fact.width and not fact.kind:
            sizes[entry.position] = fact.seen()[::-1]
    return problems, sizes


def _within_limit(facts: Facts) -> bool:
    """Whether facts also hold for today's limit of pixels."""
    return facts.kind != "file-bomb" and facts.width * facts.height <= max_pixels()


def _read_all(paths: list[str], mode: str) -> list[Facts]:
    decode = mode == "decode"

    def read_batch(start: int) -> list[Facts]:
        return [read_facts(path, decode=decode) for path in paths[start : start + _BATCH]]

    result: list[Facts] = []
    text = "reading images" if decode else "reading image headers"
    threads = min(8, 2 * (os.cpu_count() or 1))
    with (
        warnings.catch_warnings(),
        progress_bar(text, "image", total=len(paths)) as bar,
    ):
        # Pillow warns about large images and damaged metadata. All threads share these filters.
        warnings.simplefilter("ignore")
        with ThreadPoolExecutor(threads) as pool:
            for facts in pool.map(read_batch, range(0, len(paths), _BATCH)):
                result += facts
                bar.update(len(facts))
    return result


def _faults(entry: ImageEntry, fact: Facts) -> list[tuple[str, str]]:
    """(kind, detail) of each problem of an image file that exists."""
    if fact.kind:
        return [(fact.kind, fact.detail)]
    seen, expected = fact.seen(), (entry.width, entry.height)
    in_json = f"but the json says {entry.width} x {entry.height}"
    faults = []
    if expected != seen and expected == (fact.width, fact.height):
        detail = f"has EXIF orientation {fact.orientation} and is read as {seen[0]} x {seen[1]}"
        faults.append(("file-rotated", f"{detail}, {in_json}"))
    elif expected != seen and entry.width:
        faults.append(("file-size", f"is {seen[0]} x {seen[1]}, {in_json}"))
    if min(seen) == 1:
        faults.append(("file-thin", f"is {seen[0]} x {seen[1]}"))
    if fact.mode in _DEEP_MODES:
        faults.append(("file-deep", f"has the mode {fact.mode}"))
    if fact.mode == "CMYK":
        faults.append(("file-cmyk", "is CMYK"))
    if fact.alpha:
        faults.append(("file-alpha", f"has transparency (mode {fact.mode})"))
    return faults


def shared_images(
    first: tuple[Path, Sequence[ImageEntry]], second: tuple[Path, Sequence[ImageEntry]]
) -> list[tuple[ImageEntry, ImageEntry]]:
    """Finds images of two data sets with the same bytes.

    Args:
        first, second: the image folder and the images of each data set.

    Returns:
        pairs of an image of the first data set and the first equal image of the second.
    """
    firsts, seconds = _existing_files(*first), _existing_files(*second)
    by_path = {path: entry for path, _, entry in reversed(seconds)}  # the first entry of a path
    # Files are compared by size, then by the hash of their ends, then by that of the whole file.
    # Each step drops the files whose key is not in both data sets, so that few are read completely.
    keys: dict[str, tuple[Any, ...]] = {path: (size,) for path, size, _ in [*seconds, *firsts]}
    for add_hash in (_hash_ends, _hash_content):
        common = {key for path, key in keys.items() if path in by_path}
        common &= {key for path, key in keys.items() if path not in by_path}
        keys = {path: (*key, add_hash(path)) for path, key in keys.items() if key in common}
    by_key = {key: by_path[path] for path, key in reversed(keys.items()) if path in by_path}
    matches = (
        (entry, by_path.get(path) or by_key.get(keys.get(path, ()))) for path, _, entry in firsts
    )
    return [(entry, match) for entry, match in matches if match]


def _existing_files(root: Path, entries: Sequence[ImageEntry]) -> list[tuple[str, int, ImageEntry]]:
    """(path, size in bytes, entry) of each image whose file exists and is not empty."""
    finder = Finder(root)
    located = ((finder.find(entry.file_name), entry) for entry in entries)
    return [(place.path, place.size, e) for place, e in located if place.path and place.size]


def _hash_ends(path: str) -> str:
    """A hash of a file's first and last bytes; the path if the file cannot be read."""
    try:
        with Path(path).open("rb") as file:
            data = file.read(_ENDS)
            file.seek(max(0, os.fstat(file.fileno()).st_size - _ENDS))
            return hashlib.sha256(data + file.read(_ENDS)).hexdigest()
    except OSError:
        return path


def _hash_content(path: str) -> str:
    try:
        return hash_file(path)
    except OSError:
        return path
