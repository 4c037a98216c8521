"""Any picture as the one that detectron2's predictor takes: (H, W, 3), uint8, BGR, upright."""

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
from mask_rcnn_plus.errors import UserError

logger = logging.getLogger(__name__)

BGR = npt.NDArray[np.uint8]
_SERIES = ("GIF", "TIFF", "WEBP", "PNG")
# PIL's names of 16 bits a pixel.
_SIXTEEN = ("I;16", "I;16L", "I;16B", "I;16N")


def to_bgr(image: Any, *, array_format: str = "BGR", named: str = "image") -> BGR:
    """A picture of any kind that people have, ready for a model.

    Colours are converted to 8 bits of blue, green and red. Of 16 bits a channel the upper 8 count;
    transparency is left away, as detectron2 does; files and PIL images are turned upright by
    their EXIF orientation. Of a file with several pictures the first is taken, which a warning
    says.

    Args:
        image: a path; a PIL image; or an array (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), uint8 or
            uint16, from 0 to the type's largest value.
        array_format: the order of an array's colours, "BGR" as OpenCV has them, or "RGB".
        named: how messages call it, where it is no path.

    Returns:
        (H, W, 3), uint8, BGR; the array itself where it is so already.

    Raises:
        UserError: a file is missing, no image or damaged; an array is of another type or shape.
    """
    if isinstance(image, str | os.PathLike):
        return _read(Path(image))
    if isinstance(image, Image.Image):
        return _from_pil(image, named)
    if isinstance(image, np.ndarray):
        return _from_array(image, array_format, named)
    kind = type(image).__name__
    raise UserError(
        f"{named} is a {kind}: give a path, a PIL image, or a NumPy array (height, width, 3)"
    )


def _read(path: Path) -> BGR:
    if not path.exists():
        raise UserError(f"{path} does not exist")
    if path.is_dir():
        raise UserError(f"{path} is a folder, no image")
    try:
        with warnings.catch_warnings():
            # Of large images and damaged metadata.
            warnings.simplefilter("ignore")
            with open_image(path) as image:
                # A GIF or a stack of microscopy; a JPEG's others are previews.
                if image.format in _SERIES and getattr(image, "is_animated", False):
                    logger.warning(f"{path} holds several pictures: the first is taken")
                return _from_pil(image, str(path))
    except UserError:
        raise
    # Pillow's decoders raise what they like on damaged files.
    except Exception as error:
        if isinstance(error, Image.UnidentifiedImageError):
            reason = "no image" if path.stat().st_size else "an empty file"
            raise UserError(f"{path} is {reason}") from error
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise UserError(f"{path} cannot be read: {reason}") from error


def _from_pil(image: Image.Image, named: str) -> BGR:
    if image.mode in ("F", "I"):
        raise UserError(
            f"{named} has 32 bits a pixel (mode {image.mode}), of which it is not known what is "
            "white: convert it to 8 or 16 bits"
        )
    # detectron2's own, as in training; it forgives damaged EXIF.
    image = detection_utils._apply_exif_orientation(image)
    if image.mode in _SIXTEEN:
        # Pillow would make white of all above 255.
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
            f"{named} is an array of the shape {array.shape}: give (height, width), or (height, "
            "width, channels) with 1, 3 or 4 channels"
        )
    if array.shape[2] == 1:
        return np.repeat(array, 3, axis=2)
    if array.shape[2] == 3 and array_format == "BGR":
        return array
    array = array[:, :, :3]
    return np.ascontiguousarray(array if array_format == "BGR" else array[:, :, ::-1])
