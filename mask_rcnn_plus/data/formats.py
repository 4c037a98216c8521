"""The supported image formats. EPS is not among them, because Pillow runs Ghostscript to read it.

A file's first bytes determine its format, not its name. Training, evaluation, prediction and the
commands open images here. detectron2's ``read_image`` and Pillow do not change, so an application
can still read other formats, such as HEIF, with them.
"""

import functools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data import detection_utils
from detectron2.utils.file_io import PathManager
from PIL import Image, UnidentifiedImageError

from mask_rcnn_plus.errors import UserError

_FORMATS = (
    *("JPEG", "PNG", "TIFF", "BMP", "DIB", "WEBP", "AVIF", "JPEG2000", "GIF", "PPM"),
    *("TGA", "ICO", "QOI", "SGI", "PCX"),
)


@functools.cache
def formats() -> tuple[str, ...]:
    """The supported formats that the installed Pillow opens. (It opens MPO as a kind of JPEG.)"""
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def conversion_hint(path: str | Path) -> str:
    """How to convert a file of a well-known format that is not supported; "" for other files."""
    known = Path(path).suffix.lower() in (".heic", ".heif", ".dng", ".cr2", ".nef", ".arw", ".jxl")
    return "an image that must be converted to JPEG or PNG" if known else ""


def open_image(file: Any) -> Image.Image:
    """``PIL.Image.open`` of a path or a binary file, for the supported formats only.

    Raises:
        UnidentifiedImageError: the format is not supported.
    """
    return Image.open(file, formats=formats())


def read_image(file_name: str, format: str | None = None) -> np.ndarray:
    """detectron2's ``read_image`` for the supported formats only.

    Args:
        format: a mode of Pillow, "BGR" or "YUV-BT.601".

    Returns:
        (H, W, C), uint8, rotated according to its EXIF orientation.

    Raises:
        UserError: the format is not supported.
    """
    with supported_only(file_name):
        return detection_utils.read_image(file_name, format)


@contextmanager
def supported_only(*file_names: str) -> Iterator[None]:
    """Checks the formats of files; within the block, Pillow does not warn of large images.

    Raises:
        UserError: a format is not supported.
    """
    with warnings.catch_warnings():
        # Large images are fine. Pillow refuses images that exceed its limit.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        for file_name in file_names:
            with PathManager.open(file_name, "rb") as file:
                try:
                    open_image(file).close()
                except UnidentifiedImageError as error:
                    raise UserError(
                        f"image '{file_name}': unsupported format; supported: "
                        f"{', '.join(formats())}"
                    ) from error
        yield
