"""Names, colours and labels of objects, legible on any background."""

import colorsys
import unicodedata
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

Image = npt.NDArray[Any]  # (H, W, 3), BGR, 0 to 255
Color = tuple[int, int, int]
Place = tuple[int, int, int, int]  # (x0, y0, x1, y1) in pixels, the last two not included

_FONT = cv2.FONT_HERSHEY_SIMPLEX
FONT_SCALE = 0.45
_WHITE, _BLACK = (255, 255, 255), (0, 0, 0)
# The smallest object that gets a label, as a part of the label: it must not be what one looks at.
_LEAST_ROOM = 0.25


def class_color(index: int) -> Color:
    """The colour (blue, green, red), each 0 to 255, of a class: always the same."""
    # Steps of the golden ratio around the colour wheel keep neighbouring classes far apart.
    hue = (0.4 + index * 0.618034) % 1.0
    lightness = (0.55, 0.72, 0.38)[index // 8 % 3]
    red, green, blue = colorsys.hls_to_rgb(hue, lightness, 0.85)
    return round(255 * blue), round(255 * green), round(255 * red)


def text_color(background: Color) -> Color:
    """Black or white, whichever reads better on the colour (blue, green, red)."""
    blue, green, red = background
    return _BLACK if 0.114 * blue + 0.587 * green + 0.299 * red > 140 else _WHITE


def class_name(class_names: Sequence[str], index: int) -> str:
    """The name of a class, as far as it can be written."""
    name = class_names[index] if index < len(class_names) else ""
    return plain_text(name, otherwise="") or f"class {index}"


def plain_text(text: str, otherwise: str) -> str:
    """The text without accents, or the other one where OpenCV's font would show question marks."""
    decomposed = unicodedata.normalize("NFKD", text)
    text = "".join(letter for letter in decomposed if not unicodedata.combining(letter))
    return text if text.isascii() else otherwise


def text_size(text: str, scale: float = FONT_SCALE) -> tuple[int, int]:
    """Width and height of a line of text in pixels, with a margin of a few pixels around it."""
    (width, height), baseline = cv2.getTextSize(text, _FONT, scale, _stroke(scale))
    margin = _margin(scale)
    # OpenCV 5 draws with another font than 4, whose descenders pass the baseline it returns.
    return width + 2 * margin, height + max(baseline, height // 2) + 2 * margin - 2


def write_text(
    image: Image, text: str, corner: tuple[int, int], color: Color, scale: float = FONT_SCALE
) -> None:
    """Writes a line into the image, in place; ``corner`` is the top left (x, y) of its margin."""
    stroke, margin = _stroke(scale), _margin(scale)
    (_, height), _ = cv2.getTextSize(text, _FONT, scale, stroke)
    origin = (corner[0] + margin, corner[1] + height + margin)
    cv2.putText(image, text, origin, _FONT, scale, color, stroke, cv2.LINE_AA)


def _stroke(scale: float) -> int:
    return max(1, int(1.7 * scale))


def _margin(scale: float) -> int:
    return max(3, round(6 * scale))


def draw_labels(
    canvas: Image,
    boxes: npt.NDArray[np.float64],
    labels: Sequence[str],
    colors: Sequence[Color],
    order: npt.NDArray[np.int64],
    scale: float = FONT_SCALE,
    small: bool = False,
) -> None:
    """Writes the labels at the boxes where there is room, in place.

    A label has its object's colour behind it. It is left out where it would cover another one,
    or more of an object than it leaves to be seen.

    Args:
        canvas: (H, W, 3), BGR.
        boxes: (R, 4), in pixels of the canvas.
        labels, colors: one an object; a label may be empty.
        order: which of the R come first to a place.
        scale: the size of the text.
        small: label objects smaller than their label too, where that covers no other object.
    """
    taken: list[Place] = []
    for i in order:
        x0, y0, x1, y1 = boxes[i].round().astype(int).tolist()
        text, color = labels[i], colors[i]
        if not text:
            continue
        width, height = text_size(text, scale)
        room = (x1 - x0) * (y1 - y0) / (width * height)
        left = max(0, min(x0, canvas.shape[1] - width))
        # Above the box, below it, or inside where that leaves most of the object to be seen.
        for top in (y0 - height, y1, *((y0, y1 - height) if room > 3 else ())):
            place = (left, top, left + width, top + height)
            if top < 0 or place[3] > canvas.shape[0] or any(_overlap(place, t) for t in taken):
                continue
            # Of a small object the label may be as large as its neighbours.
            if room < 1 and (not small or room < _LEAST_ROOM or _covers_another(place, boxes, i)):
                continue
            taken.append(place)
            cv2.rectangle(canvas, place[:2], (place[2] - 1, place[3] - 1), color, cv2.FILLED)
            write_text(canvas, text, place[:2], text_color(color), scale)
            break


def _covers_another(place: Place, boxes: npt.NDArray[np.float64], own: int) -> bool:
    x0, y0, x1, y1 = place
    meets = (boxes[:, 0] < x1) & (boxes[:, 2] > x0) & (boxes[:, 1] < y1) & (boxes[:, 3] > y0)
    meets[own] = False
    return bool(meets.any())


def _overlap(a: Place, b: Place) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
