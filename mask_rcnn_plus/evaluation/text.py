"""Draws text into images: with OpenCV's font, or with another font for letters that it lacks.

OpenCV 5 contains Latin, Greek, Cyrillic, Chinese, Japanese and Korean letters, OpenCV 4 only ASCII.
Neither draws right-to-left scripts. Pillow does, with any font file.
"""

import functools
import logging
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image as PILImage
from PIL import ImageDraw, ImageFont, features

from mask_rcnn_plus.errors import printable

Image = npt.NDArray[Any]  # (H, W, 3), BGR, 0 to 255
Color = tuple[int, int, int]

FONT_SCALE = 0.45
_FONT = cv2.FONT_HERSHEY_SIMPLEX
_PIXELS = 22 * 1.3  # of Pillow's fonts at the scale 1
_logger = logging.getLogger(__name__)


def class_name(class_names: Sequence[str], index: int) -> str:
    """The name of a class in drawable letters, or "class <index>" if no font has its letters."""
    name = class_names[index] if index < len(class_names) else ""
    return drawable(name, otherwise=f"class {index}") or f"class {index}"


@functools.cache
def drawable(text: str, *, otherwise: str) -> str:
    """The text on one line, in letters that a font has.

    Accents are removed if no font has them. If no font has the letters either, returns
    ``otherwise``, and a warning says what to install.
    """
    text = printable(" ".join(unicodedata.normalize("NFC", text).split()))
    plain = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    for candidate in (text, plain):
        if _opencv_draws(candidate) or _font_file(candidate):
            return candidate
    _logger.warning(
        f"'{text}' is drawn as '{otherwise}', because no installed font has its letters: install "
        "opencv-python 5, or a font such as Noto Sans (on Debian: apt-get install fonts-noto-core "
        "fonts-noto-cjk libfribidi0)"
    )
    return otherwise


def text_size(text: str, scale: float = FONT_SCALE) -> tuple[int, int]:
    """Width and height of a line of text in pixels, including a margin of a few pixels."""
    (width, height), baseline = cv2.getTextSize(text, _FONT, scale, _stroke(scale))
    if font := _pillow_font(text, scale):
        width = round(font.getlength(text))
        height, baseline = (round(part) for part in font.getmetrics())
    margin = _margin(scale)
    # OpenCV 5 has another font than OpenCV 4; its descenders exceed the baseline it returns.
    return width + 2 * margin, height + max(baseline, height // 2) + 2 * margin - 2


def write_text(
    image: Image, text: str, corner: tuple[int, int], color: Color, scale: float = FONT_SCALE
) -> None:
    """Writes a line into the image, in place; ``corner`` is the top left (x, y) of its margin."""
    stroke, margin = _stroke(scale), _margin(scale)
    if font := _pillow_font(text, scale):
        width, height = text_size(text, scale)
        x, y = corner
        area = image[max(0, y) : y + height, max(0, x) : x + width]
        ink = PILImage.new("L", area.shape[1::-1])
        ImageDraw.Draw(ink).text((min(0, x) + margin, min(0, y) + margin), text, 255, font)
        alpha = np.asarray(ink, np.float32)[:, :, None] / 255
        area[:] = np.rint(area + alpha * (np.array(color) - area))
        return
    (_, height), _ = cv2.getTextSize(text, _FONT, scale, stroke)
    origin = (corner[0] + margin, corner[1] + height + margin)
    cv2.putText(image, text, origin, _FONT, scale, color, stroke, cv2.LINE_AA)


def shortened(text: str, width: int, scale: float = FONT_SCALE) -> str:
    """The text, with "..." in its middle if it is wider than a number of pixels."""
    short, kept = text, len(text)
    while kept > 2 and text_size(short, scale)[0] > width:
        kept -= 1
        short = f"{text[: (kept + 1) // 2]}...{text[len(text) - kept // 2 :]}"
    return short


def _stroke(scale: float) -> int:
    return max(1, int(1.7 * scale))


def _margin(scale: float) -> int:
    return max(3, round(6 * scale))


def _right_to_left(text: str) -> bool:
    return any(unicodedata.bidirectional(letter) in ("R", "AL") for letter in text)


def _opencv_draws(text: str) -> bool:
    return not _right_to_left(text) and all(map(_opencv_has, text))


@functools.cache
def _opencv_has(letter: str) -> bool:
    """Whether OpenCV has a letter. It draws "?" for others, OpenCV 4 for each byte of UTF-8."""
    if letter.isascii():
        return True
    drawings = []
    for text in (letter, "?", "?" * len(letter.encode())):
        drawings.append(np.zeros((40, 120), np.uint8))
        cv2.putText(drawings[-1], text, (5, 30), _FONT, 0.6, 255, 1, cv2.LINE_AA)
    return not any(np.array_equal(drawings[0], other) for other in drawings[1:])


def _pillow_font(text: str, scale: float) -> ImageFont.FreeTypeFont | None:
    """The font for Pillow to draw with; None if OpenCV can draw the text, or if no font can."""
    if text.isascii() or _opencv_draws(text):
        return None
    path = _font_file(text)
    return _load(path, round(_PIXELS * scale)) if path else None


@functools.cache
def _load(path: str, pixels: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(path, pixels)


def _font_file(text: str) -> str | None:
    """A font file that has all letters: matplotlib's own, or one of the system."""
    if _right_to_left(text) and not features.check("raqm"):
        return None  # without raqm, Pillow draws the letters in the wrong order
    return _font_with(frozenset(letter for letter in text if not letter.isascii()))


@functools.cache
def _font_with(letters: frozenset[str]) -> str | None:
    import matplotlib
    from matplotlib import font_manager, ft2font

    own = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
    system = (path for path in font_manager.findSystemFonts() if "LastResort" not in path)
    required = {ord(letter) for letter in letters} | set(range(0x21, 0x7F))
    for path in (str(own), *sorted(system, key=lambda path: ("Regular" not in path, path))):
        try:
            if required <= ft2font.FT2Font(path).get_charmap().keys():
                return path
        except (RuntimeError, OSError, ValueError):  # a font that FreeType cannot read
            continue
    return None
