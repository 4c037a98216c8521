"""Reads images, masks and json files, and finds images by what other tools call them."""

import base64
import io
import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from PIL import Image

from mask_rcnn_plus.data.formats import open_image
from mask_rcnn_plus.data.mask_rules import max_pixels
from mask_rcnn_tools.convert.found import Found, Picture

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".avif", ".jp2", ".gif")
_ORIENTATION = 0x0112
_TURNED = (5, 6, 7, 8)  # EXIF orientations that exchange the sides

Array = npt.NDArray[Any]


class Unreadable(Exception):
    """Why a file cannot be read."""


def measure(file: Path | BinaryIO) -> tuple[int, int, int]:
    """Height and width of an image as it is seen, and its EXIF orientation.

    Raises:
        Unreadable: it is no image.
    """
    with _opened(file) as image:
        width, height = image.size
        try:
            orientation = image.getexif().get(_ORIENTATION, 1)
        except Exception:  # damaged EXIF, which detectron2 passes over as well
            orientation = 1
    if orientation not in range(1, 9):
        orientation = 1
    if orientation in _TURNED:
        height, width = width, height
    return height, width, orientation


def read_pixels(file: Path | BinaryIO) -> Array:
    """An image of labels: (H, W) of palette indices or values, or (H, W, 3) of colours.

    Raises:
        Unreadable: it is no image.
    """
    with _opened(file) as image:
        try:
            if image.mode in ("1", "L", "P", "I", "I;16", "I;16B", "I;16L"):
                return np.asarray(image).astype(np.int64)
            return np.asarray(image.convert("RGB")).astype(np.int64)
        except Exception as error:
            raise Unreadable(f"cannot be decoded: {_reason(error)}") from error


def read_json(path: Path) -> Any:
    """A json's content.

    Raises:
        Unreadable: it is none.
    """
    try:
        # Windows' editors put a mark before UTF-8.
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise Unreadable(f"cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise Unreadable(f"is no json: {_reason(error)}") from error


def from_base64(text: Any) -> bytes:
    """The bytes that a json holds as text.

    Raises:
        Unreadable: it is no such text.
    """
    try:
        return base64.b64decode(text, validate=True)
    except (ValueError, TypeError) as error:
        raise Unreadable(f"is no base64: {_reason(error)}") from error


def find_image(name: str, bases: Sequence[Path], roots: Sequence[Path]) -> tuple[Path, str] | None:
    """The file that a label names, never one outside the folders that the user named.

    Args:
        name: as the tool has it: relative, absolute, or with Windows' backslashes.
        bases: folders that it may count from; where nothing is there, its last part is tried.
        roots: the folders that may be read.

    Returns:
        the file, and its name from its root; or None.
    """
    spelt = name.replace("\\", "/")
    if not spelt or "\0" in spelt:
        return None
    last = PurePosixPath(spelt).name
    for candidate in (*(base / spelt for base in bases), *(base / last for base in bases)):
        real = Path(os.path.realpath(candidate))
        for root in roots:
            top = Path(os.path.realpath(root))
            if real.is_relative_to(top) and real.is_file():
                return real, real.relative_to(top).as_posix()
    return None


def images_below(folder: Path) -> list[Path]:
    """All image files by their suffix, sorted, without hidden files and folders."""
    return [path for path in files_below(folder) if path.suffix.lower() in SUFFIXES]


def files_below(folder: Path, suffix: str = "") -> list[Path]:
    """All files, sorted, without hidden ones and what lies in hidden folders."""
    return sorted(
        path
        for path in folder.rglob(f"*{suffix}")
        if path.is_file() and not any(p.startswith(".") for p in path.relative_to(folder).parts)
    )


def to_picture(path: Path, name: str, found: Found) -> Picture | None:
    """An image without objects yet; one that cannot be read is counted, and None."""
    try:
        height, width, orientation = measure(path)
    except Unreadable as error:
        found.skip("images cannot be read", f"{path} {error}")
        return None
    return Picture(name, height, width, path, orientation=orientation)


def upright(labels: Array, picture: Picture) -> Array:
    """Labels (H, W, ...) of an image's pixels, turned as the image is when it is seen.

    Raises:
        Unreadable: they have another size, or it cannot be told whether they are turned already.
    """
    size = labels.shape[:2]
    seen = (picture.height, picture.width)
    stored = seen[::-1] if picture.orientation in _TURNED else seen
    if size not in (seen, stored):
        raise Unreadable(
            f"is {size[1]} x {size[0]} pixels, its image {picture.width} x {picture.height}"
        )
    if picture.orientation == 1 or size != stored:
        return labels
    if size == seen:
        raise Unreadable(
            f"may be turned or not: its image has EXIF orientation {picture.orientation}; save "
            "both upright"
        )
    return turn(labels, picture.orientation)


def turn(pixels: Array, orientation: int) -> Array:
    """Pixels (H, W, ...) as stored to how they are seen.

    Args:
        orientation: EXIF's, 1 to 8: 6 is turned clockwise by a quarter to be seen.
    """
    if orientation in (2, 4):
        return pixels[:, ::-1] if orientation == 2 else pixels[::-1]
    if orientation in (5, 7):
        swapped = pixels.swapaxes(0, 1)
        return swapped if orientation == 5 else swapped[::-1, ::-1]
    return np.rot90(pixels, {1: 0, 3: 2, 6: -1, 8: 1}[orientation])


def _opened(file: Path | BinaryIO) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large images and damaged metadata
            image = open_image(file)
    except Image.DecompressionBombError as error:
        raise Unreadable(f"has more than {max_pixels():,} pixels") from error
    except Image.UnidentifiedImageError as error:
        raise Unreadable("is in no image format that is read") from error
    except Exception as error:  # Pillow's plug-ins raise whatever their parsing trips over
        raise Unreadable(f"cannot be read: {_reason(error)}") from error
    if image.size[0] * image.size[1] > max_pixels():
        image.close()
        raise Unreadable(f"has more than {max_pixels():,} pixels")
    return image


def suffix_of(content: bytes) -> str:
    """The suffix of an image file's format.

    Raises:
        Unreadable: it is no image.
    """
    with _opened(io.BytesIO(content)) as image:
        return {"JPEG": ".jpg", "MPO": ".jpg", "TIFF": ".tif"}.get(
            image.format or "", f".{(image.format or 'png').lower()}"
        )


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__
