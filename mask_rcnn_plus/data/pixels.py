"""The pixels that the model sees: one rule for training, evaluation, prediction and pictures.

An image becomes 8-bit RGB in the channel order of INPUT.FORMAT, upright by its EXIF orientation.
Transparency is ignored. Grey images of 16 and 32 bits are scaled by INPUT.SIXTEEN_BIT; 16-bit
colours are reduced to their upper 8 bits, as Pillow reads them.
"""

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from detectron2.data import detection_utils
from detectron2.utils.file_io import PathManager
from PIL import Image

from mask_rcnn_plus.data.formats import open_image, reading
from mask_rcnn_plus.errors import UserError

logger = logging.getLogger(__name__)

BGR = npt.NDArray[np.uint8]
# Formats whose files may contain a series of images. In a JPEG, further images are previews.
_SERIES = ("GIF", "TIFF", "WEBP", "PNG")
_16_BIT_MODES = ("I;16", "I;16L", "I;16B", "I;16N")  # Pillow's names
_32_BIT_MODES = ("I", "F")
# Pillow reads 16-bit files of these formats as 32 bits, with white at 65535.
_WIDENED = ("PNG", "PPM")
_STRIP = 2**22  # pixels converted at a time, to limit the memory for large images


def read_image(file_name: str, format: str = "BGR", *, sixteen_bit: str = "image") -> BGR:
    """The pixels of a file.

    Args:
        file_name: a path, or anything else that detectron2's PathManager opens.
        format: as INPUT.FORMAT: "BGR", "RGB" or "L" (grey).
        sixteen_bit: as INPUT.SIXTEEN_BIT.

    Returns:
        (H, W, 3), for "L" (H, W, 1), uint8.

    Raises:
        UserError: the file is missing, damaged or not an image.
    """
    subject = f"image '{file_name}'"
    with (
        reading(file_name, subject),
        PathManager.open(file_name, "rb") as file,
        open_image(file) as image,
    ):
        return in_format(_from_pil(image, sixteen_bit, subject), format)


def to_bgr(
    image: Any, *, array_format: str = "BGR", sixteen_bit: str = "image", named: str = "image"
) -> BGR:
    """The pixels of an image file, PIL image or array, as for a model with INPUT.FORMAT BGR.

    If a file contains several images, the first one is used, and a warning is logged.

    Args:
        image: a path; a PIL image; or an array (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), uint8 or
            uint16, from 0 to the type's largest value.
        array_format: channel order of arrays: "BGR", as in OpenCV, or "RGB".
        sixteen_bit: as INPUT.SIXTEEN_BIT.
        named: the name of an array or PIL image in messages.

    Returns:
        (H, W, 3), uint8, BGR; the array itself if it already has this form.

    Raises:
        UserError: a file is missing, damaged or not an image; the type or shape is unsupported;
            the channel order is unknown.
    """
    check_array_format(array_format)
    if isinstance(image, str | os.PathLike):
        path = Path(image)
        with reading(path, str(path)), path.open("rb") as file, open_image(file) as opened:
            if opened.format in _SERIES and getattr(opened, "is_animated", False):
                logger.warning(f"{path} contains several images: the first one is used")
            return _from_pil(opened, sixteen_bit, str(path))
    if isinstance(image, Image.Image):
        with reading("", named):  # it may not be decoded yet
            return _from_pil(image, sixteen_bit, named)
    if isinstance(image, np.ndarray):
        return _from_array(image, array_format, sixteen_bit, named)
    raise UserError(
        f"{named} is a {type(image).__name__}: give a path, a PIL image, or a NumPy array (height, "
        "width, 3)"
    )


def check_array_format(array_format: str) -> None:
    """Raises a UserError for an unknown channel order of arrays."""
    if array_format not in ("BGR", "RGB"):
        raise UserError(f"array_format is '{array_format}': must be BGR or RGB")


def in_format(image: BGR, format: str) -> BGR:
    """Converts BGR pixels to INPUT.FORMAT: BGR, RGB or L; (H, W, 3), for L (H, W, 1)."""
    if format == "BGR":
        return image
    if format == "RGB":
        return np.ascontiguousarray(image[:, :, ::-1])
    if format == "L":
        return np.array(Image.fromarray(image[:, :, ::-1]).convert("L"))[:, :, None]
    raise UserError(f"INPUT.FORMAT is '{format}': must be BGR, RGB or L")


def _from_pil(image: Image.Image, sixteen_bit: str, named: str) -> BGR:
    if 0 in image.size:
        raise UserError(f"{named} has {image.width} x {image.height} pixels: replace or remove it")
    # detectron2's own function. It ignores damaged EXIF data.
    upright = detection_utils._apply_exif_orientation(image)
    result = np.empty((upright.height, upright.width, 3), np.uint8)
    if image.mode in (*_16_BIT_MODES, *_32_BIT_MODES):
        sixteen = image.mode in _16_BIT_MODES or image.format in _WIDENED
        low, high = _value_range(
            sixteen_bit, (part for _, part in _strips(upright)), sixteen=sixteen, named=named
        )
        for rows, part in _strips(upright):
            result[rows] = _scaled(np.asarray(part), low, high)[:, :, None]
    else:
        for rows, part in _strips(upright):
            part = part if part.mode == "RGB" else part.convert("RGB")
            result[rows] = np.asarray(part)[:, :, ::-1]
    return result


def _strips(image: Image.Image) -> Iterator[tuple[slice, Image.Image]]:
    """Horizontal parts of an image, each with the slice of its rows."""
    step = max(1, _STRIP // image.width)
    if step >= image.height:
        yield slice(None), image
        return
    for top in range(0, image.height, step):
        bottom = min(image.height, top + step)
        yield slice(top, bottom), image.crop((0, top, image.width, bottom))


def _value_range(
    rule: str, parts: Iterator[Any], *, sixteen: bool, named: str
) -> tuple[float, float]:
    """The input values that become 0 and 255, according to INPUT.SIXTEEN_BIT.

    Args:
        parts: all pixels, as images or arrays.
        sixteen: whether white is 65535.
    """
    if rule == "image":
        extremes = []
        for part in parts:
            values = np.asarray(part)
            finite = values[np.isfinite(values)]
            extremes += [finite.min(), finite.max()] if finite.size else []
        return float(min(extremes, default=0)), float(max(extremes, default=0))
    if rule == "full":
        if sixteen:
            return 0.0, 65535.0
        raise UserError(
            f"{named} has 32 bits per pixel, and its value for white is unknown: set "
            "INPUT.SIXTEEN_BIT to 'image' or to a range such as 0..4095"
        )
    try:
        low, high = map(float, rule.split(".."))
    except ValueError:
        low = high = 0.0
    if not -np.inf < low < high < np.inf:
        raise UserError(
            f"INPUT.SIXTEEN_BIT is '{rule}': must be image, full, or a range such as 0..4095"
        )
    return low, high


def _scaled(values: npt.NDArray[Any], low: float, high: float) -> BGR:
    """Values of any type as uint8: ``low`` and below as 0, ``high`` and above as 255, NaN as 0."""
    factor = 255 / (high - low) if high > low else 0.0
    values = np.clip(values.astype(np.float64), low, high)
    return np.rint(np.nan_to_num(values - low) * factor).astype(np.uint8)


def _from_array(array: npt.NDArray[Any], array_format: str, sixteen_bit: str, named: str) -> BGR:
    if array.dtype not in (np.uint8, np.uint16):
        raise UserError(
            f"{named} is an array of {array.dtype}: give uint8 from 0 to 255, or uint16 from 0 to "
            "65535"
        )
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4) or 0 in array.shape:
        raise UserError(
            f"{named} is an array with shape {array.shape}: give (height, width), or (height, "
            "width, channels) with 1, 3 or 4 channels"
        )
    if array.dtype == np.uint16:
        if array.shape[2] == 1:
            limits = _value_range(sixteen_bit, iter([array]), sixteen=True, named=named)
            array = _scaled(array, *limits)
        else:
            array = (array >> 8).astype(np.uint8)
    if array.shape[2] == 1:
        return np.repeat(array, 3, axis=2)
    if array.shape[2] == 3 and array_format == "BGR":
        return array
    array = array[:, :, :3]
    return np.ascontiguousarray(array if array_format == "BGR" else array[:, :, ::-1])
