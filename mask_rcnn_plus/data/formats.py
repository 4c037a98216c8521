"""The supported image formats, their file endings, and the largest image.

A file's first bytes determine its format, not its name. Training, evaluation, prediction and the
commands open images here. EPS is not supported, because Pillow runs Ghostscript to read it.
detectron2's ``read_image`` and Pillow do not change, so an application can still read other
formats, such as HEIF, with them.
"""

import functools
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image, TiffImagePlugin, UnidentifiedImageError

from mask_rcnn_plus.data.mask_rules import max_pixels
from mask_rcnn_plus.errors import UserError, reason

_FORMATS = (
    *("JPEG", "PNG", "TIFF", "BMP", "DIB", "WEBP", "AVIF", "JPEG2000", "GIF", "PPM"),
    *("TGA", "ICO", "QOI", "SGI", "PCX"),
)
_RAW = "camera raw"
# Well-known formats that are not supported: their endings, and a program that converts them.
_CONVERTERS = {
    "HEIF": (".heic .heif .hif", "heif-convert (libheif) or ImageMagick"),
    _RAW: (
        ".dng .cr2 .cr3 .nef .arw .orf .rw2 .raf .pef .srw",
        "darktable-cli or RawTherapee",
    ),
    "PDF": (".pdf", "pdftoppm (Poppler)"),
    "SVG": (".svg .svgz", "rsvg-convert (librsvg) or Inkscape"),
    "DICOM": (".dcm .dicom", "dcm2img (DCMTK)"),
    "JPEG XL": (".jxl", "djxl (libjxl)"),
    "a microscope's format": (".czi .nd2 .lif .vsi .oir .ims", "bfconvert (Bio-Formats)"),
}
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
_DNG_VERSION = 50706  # a TIFF tag; such a file begins with a small preview


@functools.cache
def formats() -> tuple[str, ...]:
    """The supported formats that the installed Pillow opens. (It opens MPO as a kind of JPEG.)"""
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


@functools.cache
def endings() -> tuple[str, ...]:
    """The file endings of the supported formats, such as ".jpg", the common formats first."""
    known = Image.registered_extensions()
    return tuple(e for name in (*formats(), "MPO") for e, format in known.items() if format == name)


def open_image(file: Any) -> Image.Image:
    """``PIL.Image.open`` of a path or a binary file, for the supported formats only.

    Raises:
        UnidentifiedImageError: the format is not supported.
    """
    image = Image.open(file, formats=formats())
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        suffix = Path(str(getattr(file, "name", file))).suffix.lower()
        if _DNG_VERSION in image.tag_v2 or suffix in _CONVERTERS[_RAW][0].split():
            image.close()
            raise UnidentifiedImageError(_RAW)
    return image


def conversion_hint(path: str | Path) -> str:
    """How to convert a file of a well-known format that is not supported; "" for other files."""
    suffix = Path(path).suffix.lower()
    kind = next((k for k, (names, _) in _CONVERTERS.items() if suffix in names.split()), "")
    try:
        with Path(path).open("rb") as file:
            head = file.read(12)
    except (OSError, ValueError):
        head = b""
    if head[4:8] == b"ftyp" and head[8:] in _HEIF_BRANDS:  # phones also call such files .jpg
        kind = "HEIF"
    return f"{kind}: convert it to JPEG or PNG, e.g. with {_CONVERTERS[kind][1]}" if kind else ""


def limit_pixels(most: int) -> None:
    """Sets the number of pixels of the largest image that Pillow opens in this process.

    Args:
        most: 0 leaves Pillow's limit as it is.
    """
    if most:
        Image.MAX_IMAGE_PIXELS = (min(most, 2**31) + 1) // 2  # Pillow refuses more than twice this


@contextmanager
def reading(path: str | Path, subject: str) -> Iterator[None]:
    """Turns errors while an image is opened and decoded into UserErrors. Pillow does not warn.

    Args:
        path: the file; "" for an image in memory.
        subject: how messages begin, such as "image 'a.jpg'".

    Raises:
        UserError: the file is missing, damaged, too large or not an image.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about large images and damaged metadata
            if Path(path).exists() and not (Path(path).is_file() or Path(path).is_dir()):
                raise UserError(f"{subject} is not a regular file")  # a pipe would block
            yield
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"{subject} does not exist") from error
    except IsADirectoryError as error:
        raise UserError(f"{subject} is a folder, not an image") from error
    except UnidentifiedImageError as error:
        if Path(path).is_file() and not Path(path).stat().st_size:
            raise UserError(f"{subject} is an empty file") from error
        hint = conversion_hint(path) or f"supported: {', '.join(formats())}"
        raise UserError(f"{subject} is not an image (unsupported format; {hint})") from error
    except Image.DecompressionBombError as error:
        raise UserError(f"{subject} {too_many_pixels(error)}") from error
    except Exception as error:  # Pillow's decoders raise many types on damaged files
        raise UserError(f"{subject} cannot be read: {reason(error, 160)}") from error


def too_many_pixels(error: Image.DecompressionBombError) -> str:
    """What to say after the name of an image that exceeds the limit."""
    count = re.search(r"\d+", str(error))
    pixels = f"{int(count[0]):,} pixels" if count else "too many pixels"
    return (
        f"has {pixels}, and the limit is {max_pixels():,}: if you trust it, raise the limit with "
        "--max-pixels, or in a config with INPUT.MAX_PIXELS"
    )
