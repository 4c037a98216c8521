"""Draws images of overlapping circles, squares and triangles, with masks and keypoints."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

SHAPE_KINDS = ("circle", "square", "triangle")
# All kinds share one list, as COCO's keypoint evaluation requires; each labels the points it has.
KEYPOINTS = ("centre", "top", "top_left", "top_right", "bottom_right", "bottom_left")

_MIN_SIZE = 12  # pixels: the shorter side of the box around the smallest shape
_MAX_SIZE = 0.42  # as a share of the image's shorter side
_OBJECTS = (2, 8)
_TRIES = 25  # places tried for a shape before it is left out
# How much of a shape must stay visible where others cover it.
_MIN_VISIBLE_FRACTION = 0.5
_MIN_VISIBLE_PIXELS = 50
# A larger rotation would make the names of the corners wrong.
_MAX_ROTATION = math.radians(30)
_MIN_CONTRAST = 65.0  # distance in RGB between a shape's colour and the mean of what it covers

# Corners as (keypoint, angle on screen), clockwise; the angle 0 points right, 90 degrees down.
_CORNERS = {
    "circle": (),
    "square": (("top_left", 225), ("top_right", 315), ("bottom_right", 45), ("bottom_left", 135)),
    "triangle": (("top", 270), ("bottom_right", 30), ("bottom_left", 150)),
}
# Radius of the circle through the corners, as a share of the size.
_RADIUS = {"circle": 1 / 2, "square": math.sqrt(2) / 2, "triangle": 2 / 3}


@dataclass(frozen=True)
class Shape:
    """A shape in image coordinates, in pixels: the first pixel spans 0 to 1; y points down.

    Attributes:
        kind: one of ``SHAPE_KINDS``.
        centre: (x, y).
        radius: the radius of the circle, or of the circle through the corners.
        corners: (name of the keypoint, (x, y)), clockwise on screen; empty for a circle.
    """

    kind: str
    centre: tuple[float, float]
    radius: float
    corners: tuple[tuple[str, tuple[float, float]], ...]

    def distance(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Signed distance of points from the outline, in pixels, negative inside.

        Beyond a corner it is the distance from the line of the nearer side. The coordinates x and y
        of the points are broadcast.
        """
        if not self.corners:
            return np.hypot(x - self.centre[0], y - self.centre[1]) - self.radius
        result = np.full(np.broadcast_shapes(x.shape, y.shape), -np.inf)
        points = [point for _, point in self.corners]
        for (x0, y0), (x1, y1) in zip(points, points[1:] + points[:1], strict=True):
            length = math.hypot(x1 - x0, y1 - y0)
            # The corners go clockwise on screen, so the outside is on the left.
            outward = ((y1 - y0) * (x - x0) - (x1 - x0) * (y - y0)) / length
            np.maximum(result, outward, out=result)
        return result


@dataclass(frozen=True)
class Drawn:
    """One object of an image.

    Attributes:
        kind: one of ``SHAPE_KINDS``.
        mask: (H, W) bool, the visible pixels: their centre is inside the shape and outside all
            later ones. At least 50 pixels, and half of the whole shape.
        keypoints: (6, 3) float, in the order of ``KEYPOINTS``: x and y in image coordinates, and v:
            2 visible, 1 covered by a later shape, 0 not a point of this kind (x and y are 0).
    """

    kind: str
    mask: np.ndarray
    keypoints: np.ndarray


def draw_image(
    rng: np.random.Generator, size: tuple[int, int], frequencies: Sequence[float] = (1, 1, 1)
) -> tuple[np.ndarray, list[Drawn]]:
    """Draws an image that depends only on the generator's state.

    Args:
        rng: the source of all random numbers.
        size: (H, W) in pixels, each at least 32.
        frequencies: relative frequencies of ``SHAPE_KINDS``, each above 0.

    Returns:
        the image, (H, W, 3) uint8 in RGB, and its objects from bottom to top: two to eight, or
        fewer, but at least one, in a small image.
    """
    canvas = _background(rng, size)
    # The index of the shape that each pixel shows, or -1.
    owner = np.full(size, -1, dtype=np.int16)
    shapes: list[Shape] = []
    whole: list[int] = []  # the pixels of each shape, visible or not
    for _ in range(_integer(rng, *_OBJECTS)):
        for _ in range(_TRIES):
            shape = _random_shape(rng, size, shapes, frequencies)
            window, distance = _rasterise(shape, size)
            trial = owner[window].copy()
            trial[distance < 0] = len(shapes)
            if _still_visible(owner, trial, window, whole):
                owner[window] = trial
                shapes.append(shape)
                whole.append(int((distance < 0).sum()))
                _paint(rng, canvas[window], distance)
                break
    canvas += 6 * (rng.random((*size, 1)) - 0.5)  # grain
    image = np.clip(np.rint(canvas), 0, 255).astype(np.uint8)
    drawn = [
        Drawn(shape.kind, owner == index, _keypoints(shape, shapes[index + 1 :]))
        for index, shape in enumerate(shapes)
    ]
    return image, drawn


def _uniform(rng: np.random.Generator, low: float, high: float) -> float:
    return low + (high - low) * float(rng.random())


def _integer(rng: np.random.Generator, low: int, high: int) -> int:
    """From low to high, both included."""
    return min(high, low + int(float(rng.random()) * (high - low + 1)))


def _random_shape(
    rng: np.random.Generator,
    size: tuple[int, int],
    others: list[Shape],
    frequencies: Sequence[float],
) -> Shape:
    """A shape inside the image; half of them are beside or over an earlier one."""
    kind = _choice(rng, frequencies)
    extent = _MIN_SIZE * (_MAX_SIZE * min(size) / _MIN_SIZE) ** _uniform(rng, 0, 1)
    radius = extent * _RADIUS[kind]
    height, width = size
    x = _uniform(rng, radius, width - radius)
    y = _uniform(rng, radius, height - radius)
    if others and rng.random() < 0.5:
        other = others[_integer(rng, 0, len(others) - 1)]
        angle = _uniform(rng, 0, 2 * math.pi)
        away = (other.radius + radius) * _uniform(rng, 0.35, 0.95)
        x = min(max(other.centre[0] + away * math.cos(angle), radius), width - radius)
        y = min(max(other.centre[1] + away * math.sin(angle), radius), height - radius)
    rotation = _uniform(rng, -_MAX_ROTATION, _MAX_ROTATION)
    angles = [(name, math.radians(degrees) + rotation) for name, degrees in _CORNERS[kind]]
    corners = ((name, (x + radius * math.cos(a), y + radius * math.sin(a))) for name, a in angles)
    return Shape(kind, (x, y), radius, tuple(corners))


def _choice(rng: np.random.Generator, frequencies: Sequence[float]) -> str:
    bounds = np.cumsum(frequencies)
    drawn = float(rng.random()) * bounds[-1]
    # Rounding may reach the last bound.
    return SHAPE_KINDS[min(len(bounds) - 1, int(np.searchsorted(bounds, drawn, side="right")))]


def _rasterise(shape: Shape, size: tuple[int, int]) -> tuple[tuple[slice, slice], np.ndarray]:
    """The window of the image around the shape, and the distance at the centres of its pixels."""
    (x, y), reach = shape.centre, shape.radius + 1
    rows = slice(max(0, math.floor(y - reach)), min(size[0], math.ceil(y + reach)))
    columns = slice(max(0, math.floor(x - reach)), min(size[1], math.ceil(x + reach)))
    ys = np.arange(rows.start, rows.stop)[:, None] + 0.5
    xs = np.arange(columns.start, columns.stop)[None, :] + 0.5
    return (rows, columns), shape.distance(xs, ys)


def _still_visible(
    owner: np.ndarray, trial: np.ndarray, window: tuple[slice, slice], whole: list[int]
) -> bool:
    """Whether enough of every earlier shape stays visible if the window becomes the trial."""
    shown, lost, kept = (
        np.bincount(owners.ravel() + 1, minlength=len(whole) + 1)[1 : len(whole) + 1]
        for owners in (owner, owner[window], trial)
    )
    required = np.maximum(_MIN_VISIBLE_PIXELS, _MIN_VISIBLE_FRACTION * np.array(whole))
    return bool((shown - lost + kept >= required).all())


def _keypoints(shape: Shape, later: list[Shape]) -> np.ndarray:
    result = np.zeros((len(KEYPOINTS), 3))
    for name, (x, y) in (("centre", shape.centre), *shape.corners):
        covered = any(other.distance(np.array(x), np.array(y)) < 0 for other in later)
        result[KEYPOINTS.index(name)] = (x, y, 1 if covered else 2)
    return result


def _noise(rng: np.random.Generator, size: tuple[int, int], cell: float) -> np.ndarray:
    """Smooth noise, (H, W, 1), about -0.5 to 0.5, with bumps about ``cell`` pixels wide."""
    coarse = rng.random((math.ceil(size[0] / cell) + 1, math.ceil(size[1] / cell) + 1), np.float32)
    coarse -= 0.5
    return cv2.resize(coarse, (size[1], size[0]), interpolation=cv2.INTER_CUBIC)[..., None]


def _slope(rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """A plane that rises in a random direction, (H, W, 1), about -0.5 to 0.5."""
    angle = _uniform(rng, 0, 2 * math.pi)
    ys = np.linspace(-0.5, 0.5, size[0])[:, None, None]
    xs = np.linspace(-0.5, 0.5, size[1])[None, :, None]
    return xs * math.cos(angle) + ys * math.sin(angle)


def _colour(rng: np.random.Generator) -> np.ndarray:
    return 30 + 195 * rng.random(3)


def _background(rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """Patches of three colours, with noise at several scales and a gradient of light."""
    canvas = np.broadcast_to(_colour(rng), (*size, 3))
    for cell in (_uniform(rng, 40, 90), _uniform(rng, 16, 40)):
        weight = np.clip(0.5 + 2.5 * _noise(rng, size, cell), 0, 1)
        canvas = canvas * (1 - weight) + _colour(rng) * weight
    for cell in (9.0, 3.0):
        canvas = canvas + _uniform(rng, 10, 45) * _noise(rng, size, cell)
    return canvas + _uniform(rng, 0, 70) * _slope(rng, size)


def _paint(rng: np.random.Generator, canvas: np.ndarray, distance: np.ndarray) -> None:
    """Paints a textured, shaded, anti-aliased shape onto the window of the canvas, in place."""
    below = canvas[distance < 0].mean(axis=0)
    # The first of six colours with enough contrast, otherwise the one with most.
    colours = [_colour(rng) for _ in range(6)]
    colour = max(colours, key=lambda c: min(_MIN_CONTRAST, float(np.linalg.norm(c - below))))
    size = distance.shape
    painted = colour + _uniform(rng, 0, 60) * _slope(rng, size)
    painted = painted + _uniform(rng, 5, 45) * _noise(rng, size, _uniform(rng, 3, 12))
    coverage = np.clip(0.5 - distance, 0, 1)[..., None]
    canvas += coverage * (painted - canvas)
