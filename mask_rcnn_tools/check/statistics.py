"""Box sizes, how well anchors fit them, and images that two data sets share."""

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mask_rcnn_tools.check.images import Entry
from mask_rcnn_tools.check.paths import Finder

_ENDS = 4096  # bytes of a file's begin and end that are compared before all of it
_FIT = 0.5  # IoU from which an anchor's shape suits a box


@dataclass(frozen=True)
class AnchorSettings:
    """What decides an anchor's shape beside a box's.

    Attributes:
        sizes: sides of the square anchors, in pixels of the resized image.
        ratios: height / width.
        min_size, max_size: of the resized image: its shorter side, and its longer at most; 0 for
            no resizing.
    """

    sizes: Sequence[float]
    ratios: Sequence[float]
    min_size: int
    max_size: int


def box_lines(
    shapes: Sequence[tuple[float, float, int, int]], anchors: AnchorSettings | None
) -> list[str]:
    """What there is to say of box sizes.

    Args:
        shapes: (width, height of a box, width, height of its image) in pixels.
        anchors: of the config that will train, if there is one.
    """
    if not shapes:
        return []
    values = np.array(shapes, np.float64)
    side = np.sqrt(values[:, 0] * values[:, 1])
    low, middle, high = np.percentile(side, [5, 50, 95])
    small, large = (side < 32).mean(), (side >= 96).mean()
    lines = [
        f"boxes: side {low:.0f} / {middle:.0f} / {high:.0f} px (5 %, median, 95 %); "
        f"{small:.0%} small, {1 - small - large:.0%} medium, {large:.0%} large in COCO's terms"
    ]
    if anchors is not None:
        best = anchor_fit(shapes, anchors)
        poor = float((best < _FIT).mean())
        line = f"anchors: best IoU with a box's shape {np.median(best):.2f} (median); "
        line += f"below {_FIT} for {poor:.0%} of the boxes"
        if poor > 0.1:
            scaled = side * _scales(values, anchors)
            few, many = np.percentile(scaled, [5, 95])
            line += (
                f": boxes are {few:.0f} to {many:.0f} px large after resizing, "
                f"MODEL.ANCHOR_GENERATOR.SIZES {min(anchors.sizes):g} to {max(anchors.sizes):g}"
            )
        lines.append(line)
    return lines


def anchor_fit(
    shapes: Sequence[tuple[float, float, int, int]], anchors: AnchorSettings
) -> np.ndarray:
    """The best IoU of each box with an anchor of the same centre.

    Args:
        shapes: B boxes, as in ``box_lines``.
        anchors: their shapes.

    Returns:
        (B,), from 0 to 1.
    """
    values = np.array(shapes, np.float64)
    boxes = values[:, :2] * _scales(values, anchors)[:, None]
    sizes = np.repeat(np.array(anchors.sizes, np.float64), len(anchors.ratios))
    root = np.sqrt(np.tile(np.array(anchors.ratios, np.float64), len(anchors.sizes)))
    widths, heights = sizes / root, sizes * root
    common = np.minimum(boxes[:, :1], widths) * np.minimum(boxes[:, 1:], heights)
    union = boxes.prod(1)[:, None] + widths * heights - common
    return (common / union).max(1)


def _scales(values: np.ndarray, anchors: AnchorSettings) -> np.ndarray:
    """What each image is resized by."""
    if not anchors.min_size:
        return np.ones(len(values))
    short, long = values[:, 2:].min(1), values[:, 2:].max(1)
    return np.minimum(anchors.min_size / short, (anchors.max_size or np.inf) / long)


def shared_images(
    first: tuple[Path, Sequence[Entry]], second: tuple[Path, Sequence[Entry]]
) -> list[tuple[Entry, Entry]]:
    """Images of two data sets with the same bytes.

    Args:
        first, second: the folder of the images, and the images.

    Returns:
        pairs of an image of the first, and the first of the second that is the same.
    """
    by_path: dict[str, Entry] = {}
    by_size: dict[int, list[str]] = {}
    for path, size, entry in _files(*second):
        if path not in by_path:
            by_path[path] = entry
            by_size.setdefault(size, []).append(path)
    ends: dict[str, bytes] = {}
    whole: dict[str, bytes] = {}
    # Tables, since uncompressed images of one camera are all of one size.
    by_ends: dict[int, dict[bytes, list[str]]] = {}
    by_whole: dict[tuple[int, bytes], dict[bytes, str]] = {}

    def twin(path: str, size: int) -> str:
        if path in by_path or size not in by_size:
            return path
        if size not in by_ends:
            by_ends[size] = _grouped(by_size[size], lambda one: _digest(one, ends, _ENDS))
        alike = by_ends[size].get(key := _digest(path, ends, _ENDS), [])
        if alike and (size, key) not in by_whole:
            by_whole[size, key] = {_digest(one, whole): one for one in reversed(alike)}
        return by_whole[size, key].get(_digest(path, whole), "") if alike else ""

    files = ((entry, twin(path, size)) for path, size, entry in _files(*first))
    return [(entry, by_path[other]) for entry, other in files if other in by_path]


def _grouped(paths: list[str], key: Callable[[str], bytes]) -> dict[bytes, list[str]]:
    groups: dict[bytes, list[str]] = {}
    for path in paths:
        groups.setdefault(key(path), []).append(path)
    return groups


def _files(root: Path, entries: Sequence[Entry]) -> list[tuple[str, int, Entry]]:
    finder = Finder(root)
    places = ((finder.find(entry.file_name), entry) for entry in entries)
    return [(place.path, place.size, entry) for place, entry in places if place.path and place.size]


def _digest(path: str, known: dict[str, bytes], ends: int = 0) -> bytes:
    """Of a file's content, or of its first and last bytes; unique if it cannot be read."""
    if path not in known:
        try:
            with Path(path).open("rb") as file:
                if ends:
                    data = file.read(ends)
                    file.seek(max(0, os.fstat(file.fileno()).st_size - ends))
                    known[path] = hashlib.sha256(data + file.read(ends)).digest()
                else:
                    digest = hashlib.sha256()
                    while block := file.read(1 << 20):
                        digest.update(block)
                    known[path] = digest.digest()
        except OSError:
            known[path] = os.fsencode(path)
    return known[path]
