"""Image files: size, colours and orientation from their headers, and whether they decode."""

import os
import sys
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from tqdm import tqdm

from mask_rcnn_plus.data.formats import open_image
from mask_rcnn_plus.data.mask_rules import max_pixels
from mask_rcnn_tools.check.cache import ImageCache
from mask_rcnn_tools.check.paths import Finder
from mask_rcnn_tools.check.problems import Problem

MODES = ("none", "headers", "decode")

_TURNED = (5, 6, 7, 8)  # EXIF orientations that exchange the sides
_ORIENTATION = 0x0112
_DEEP = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")
_BATCH = 64


class Facts(NamedTuple):
    """What an image file is.

    Attributes:
        kind, detail: what is wrong with the file as such, as in ``Problem``; or "".
        width, height: in pixels as stored, before the orientation; 0 if unknown.
        mode: Pillow's.
        alpha: whether it has transparency.
        orientation: EXIF's, 1 if there is none.
        decoded: whether all of it was read.
    """

    kind: str = ""
    detail: str = ""
    width: int = 0
    height: int = 0
    mode: str = ""
    alpha: bool = False
    orientation: int = 1
    decoded: bool = False


class Entry(NamedTuple):
    """An image of the json: its place in the list, id, file name, and size in pixels or 0."""

    position: int
    id: Any
    file_name: str
    height: int
    width: int


def check_images(
    entries: Sequence[Entry], root: Path, *, mode: str, cache: ImageCache, progress: bool = True
) -> tuple[list[Problem], dict[int, tuple[int, int]]]:
    """Checks the files of images.

    Args:
        entries: the images.
        root: the folder that file names count from; nothing outside is opened.
        mode: "none" looks for the files only, "headers" reads their headers, "decode" all of them.
        cache: what is known of files from earlier.
        progress: shows a bar on standard error where it takes longer than two seconds.

    Returns:
        the problems; and (height, width) as the model would see it, by index, of each image whose
        header could be read.
    """
    finder = Finder(root)
    problems: list[Problem] = []
    found: list[tuple[Entry, str]] = []
    pending: list[tuple[str, int, int]] = []
    facts: dict[str, Facts] = {}
    for entry in entries:
        place = finder.find(entry.file_name)
        if place.kind:
            problems.append(_problem(entry, place.kind, place.detail))
        elif mode != "none":
            found.append((entry, place.path))
            known = cache.get(place.path, place.size, place.mtime_ns)
            if (
                known is not None
                and len(known) == len(Facts._fields)
                and (known[-1] or mode == "headers")
            ):
                facts[place.path] = Facts(*known)
            elif place.path not in facts:
                facts[place.path] = Facts()
                pending.append((place.path, place.size, place.mtime_ns))
    for (path, size, mtime_ns), fact in zip(
        pending, _read_all([path for path, *_ in pending], mode, progress), strict=True
    ):
        facts[path] = fact
        cache.put(path, size, mtime_ns, list(fact))
    cache.save()

    sizes = {}
    for entry, path in found:
        fact = facts[path]
        problems += [_problem(entry, *fault) for fault in _faults(entry, fact)]
        if fact.width and not fact.kind:
            sides = (fact.height, fact.width)
            sizes[entry.position] = sides[::-1] if fact.orientation in _TURNED else sides
    return problems, sizes


def read_facts(path: str, *, decode: bool) -> Facts:
    """What an image file is, without an exception whatever it is.

    Args:
        path: an ordinary file.
        decode: read all of it, unless it has too many pixels.
    """
    facts = _attempt(path, decode)
    return facts._replace(decoded=decode)


def _attempt(path: str, decode: bool) -> Facts:
    try:
        with Path(path).open("rb") as file:
            if not os.fstat(file.fileno()).st_size:
                return Facts("file-unreadable", "is an empty file")
            return _read(file, decode)
    except Image.DecompressionBombError:
        return Facts("file-bomb", f"has more than {max_pixels():,} pixels")
    except Image.UnidentifiedImageError:
        return Facts("file-unreadable", "is in no image format that is read")
    except Exception as error:  # Pillow's plug-ins raise whatever their parsing trips over
        return Facts("file-unreadable", f"cannot be read: {_reason(error)}")


def _read(file: Any, decode: bool) -> Facts:
    with open_image(file) as image:
        width, height = image.size
        if width * height > max_pixels():
            return Facts("file-bomb", f"has {width} x {height} pixels", width, height)
        try:
            orientation = image.getexif().get(_ORIENTATION, 1)
        except Exception:  # damaged EXIF, which detectron2 passes over as well
            orientation = 1
        facts = Facts(
            width=width,
            height=height,
            mode=image.mode,
            alpha=image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info,
            orientation=orientation if isinstance(orientation, int) else 1,
        )
        if not decode:
            return facts
        try:
            image.load()
        except Exception as error:
            detail = f"cannot be decoded: {_reason(error)}"
            return facts._replace(kind="file-truncated", detail=detail)
        return facts


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__


def _read_all(paths: list[str], mode: str, progress: bool) -> list[Facts]:
    def batch(start: int) -> list[Facts]:
        return [read_facts(path, decode=mode == "decode") for path in paths[start : start + _BATCH]]

    result: list[Facts] = []
    if not paths:
        return result
    bar = tqdm(
        total=len(paths),
        desc="reading images" if mode == "decode" else "reading image headers",
        unit="image",
        delay=2,
        leave=False,
        file=sys.stderr,
        disable=not progress or None,  # None: only on a terminal
    )
    with warnings.catch_warnings(), bar:
        # Of large images and damaged metadata; set here, since it is not safe within threads.
        warnings.simplefilter("ignore")
        with ThreadPoolExecutor(min(8, 2 * (os.cpu_count() or 1))) as pool:
            for facts in pool.map(batch, range(0, len(paths), _BATCH)):
                result += facts
                bar.update(len(facts))
    return result


def _problem(entry: Entry, kind: str, detail: str) -> Problem:
    return Problem(kind, "images", entry.position, entry.id, entry.id, entry.file_name, detail)


def _faults(entry: Entry, fact: Facts) -> list[tuple[str, str]]:
    if fact.kind:
        return [(fact.kind, fact.detail)]
    stored, wanted = (fact.width, fact.height), (entry.width, entry.height)
    turned = fact.orientation in _TURNED
    seen = stored[::-1] if turned else stored
    faults = []
    if wanted != seen and turned and wanted == stored:
        detail = f"has EXIF orientation {fact.orientation}: it is read as {seen[0]} x {seen[1]}"
        faults.append(("file-rotated", f"{detail}, the json says {wanted[0]} x {wanted[1]}"))
    elif wanted != seen and entry.width:
        detail = f"is {seen[0]} x {seen[1]}, the json says {wanted[0]} x {wanted[1]}"
        faults.append(("file-size", detail))
    if min(stored) == 1:
        faults.append(("file-thin", f"is {seen[0]} x {seen[1]}"))
    if fact.mode in _DEEP:
        faults.append(("file-deep", f"has the mode {fact.mode}"))
    if fact.mode == "CMYK":
        faults.append(("file-cmyk", "is CMYK"))
    if fact.alpha:
        faults.append(("file-alpha", f"has transparency (mode {fact.mode})"))
    return faults
