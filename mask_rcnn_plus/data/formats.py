"""What kinds of files are read as images; not EPS, for which Pillow runs Ghostscript."""

import functools
import warnings
from typing import Any

import numpy as np
from detectron2.data import detection_utils
from PIL import Image, UnidentifiedImageError

from mask_rcnn_plus.errors import UserError

_FORMATS = (
    *("JPEG", "PNG", "TIFF", "BMP", "DIB", "WEBP", "AVIF", "JPEG2000", "GIF", "PPM"),
    *("TGA", "ICO", "QOI", "SGI", "PCX"),
)


@functools.cache
def formats() -> tuple[str, ...]:
    """Those that the installed Pillow opens, by its names. (It opens MPO as a kind of JPEG.)"""
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def restrict_detectron2() -> None:
    """Makes detectron2's ``read_image``, through which it reads all images, refuse other files.

    What a file is follows from its first bytes, whatever its name. Calling it again changes
    nothing.
    """
    read = detection_utils.read_image
    if hasattr(read, "__wrapped__"):
        return

    @functools.wraps(read)
    def read_image(file_name: str, format: str | None = None) -> np.ndarray:
        with warnings.catch_warnings():
            # Large images are fine; those beyond Pillow's limit are an error.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with detection_utils.PathManager.open(file_name, "rb") as file:
                require_image(file, file_name)
            return read(file_name, format)

    detection_utils.read_image = read_image


def require_image(file: Any, named: str) -> None:
    """Looks at the beginning of a file.

    Args:
        file: open for reading, at its beginning.
        named: for the message.

    Raises:
        UserError: it is none of ``formats()``.
    """
    try:
        with Image.open(file, formats=formats()):
            pass
    except UnidentifiedImageError as error:
        raise UserError(f"image '{named}' is none that is read: {', '.join(formats())}") from error
