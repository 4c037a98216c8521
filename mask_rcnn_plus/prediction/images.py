"""Converts any image to what detectron2's predictor accepts: (H, W, 3), uint8, BGR, upright."""

import logging
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from detectron2.data import detection_utils
from PIL import Image

from mask_rcnn_plus.data.formats import open_image
from mask_rcnn_plus.errors import UserError, reason

logger = logging.getLogger(__name__)

BGR = npt.NDArray[np.uint8]
# Formats in which several images are a series. In a JPEG, the others are previews.
_SERIES = ("GIF", "TIFF", "WEBP", "PNG")
_16_BIT_MODES = ("I;16", "I;16L", "I;16B", "I;16N")  # PIL's names


def to_bgr(image: Any, *, array_format: str = "BGR", named: str = "image") -> BGR:
    """Converts an image to 8-bit BGR.

    16-bit channels are reduced to their upper 8 bits. Transparency is ignored, as in detectron2.
    Files and PIL images are turned upright by their EXIF orientation. If a file contains several
    images, the first one is used, and a warning is logged.

    Args:
        image: a path; a PIL image; or an array (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), uint8 or
            uint16, from 0 to the type's largest value.
        array_format: channel order of arrays: "BGR", as in OpenCV, or "RGB".
        named: the name of an array or PIL image in messages.

    Returns:
        (H, W, 3), uint8, BGR; the array itself if it already has this form.

    Raises:
        UserError: a file is missing, damaged or not an image; the type or shape is unsupported.
    """
    if isinstance(image, str | os.PathLike):
        return _read(Path(image))
    if isinstance(image, Image.Image):
        return _from_pil(image, named)
    if isinstance(image, np.ndarray):
        return _from_array(image, array_format, named)
    raise UserError(
        f"{named} is a {type(image).__name__}: give a path, a PIL image, or a NumPy array (height, "
        "width, 3)"
    )


def _read(path: Path) -> BGR:
    if not path.exists():
        raise UserError(f"{path} does not exist")
    if path.is_dir():
        raise UserError(f"{path} is a folder, not an image")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about large images and damaged metadata
            with open_image(path) as image:
                if image.format in _SERIES and getattr(image, "is_animated", False):
                    logger.warning(f"{path} contains several images: the first one is used")
                return _from_pil(image, str(path))
    except UserError:
        raise
    except Image.UnidentifiedImageError as error:
        what = "is not an image" if path.stat().st_size else "is an empty file"
        raise UserError(f"{path} {what}") from error
    except Exception as error:  # Pillow's decoders raise many types on damaged files
        raise UserError(f"{path} cannot be read: {reason(error, 160)}") from error


def _from_pil(image: Image.Image, named: str) -> BGR:
    if image.mode in ("F", "I"):
        raise UserError(
            f"{named} has 32 bits per pixel (mode {image.mode}), and its value for white is "
            "unknown: convert it to 8 or 16 bits"
        )
    # detectron2's own function, as in training. It ignores damaged EXIF data.
    image = detection_utils._apply_exif_orientation(image)
    if image.mode in _16_BIT_MODES:
        # Pillow would clip all values above 255 to white.
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return np.ascontiguousarray(detection_utils.convert_PIL_to_numpy(image, "BGR"))


def _from_array(array: npt.NDArray[Any], array_format: str, named: str) -> BGR:
    if array.dtype == np.uint16:
        array = (array >> 8).astype(np.uint8)
    elif array.dtype != np.uint8:
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
    if array.shape[2] == 1:
        return np.repeat(array, 3, axis=2)
    if array.shape[2] == 3 and array_format == "BGR":
        return array
    array = array[:, :, :3]
    return np.ascontiguousarray(array if array_format == "BGR" else array[:, :, ::-1])
