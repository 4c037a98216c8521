"""How well anchors cover boxes, and anchors that cover them better."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from mask_rcnn_plus.data.box_sizes import SeenBoxes

Floats = npt.NDArray[np.float64]

# Factors by which the search changes one size or ratio, coarse to fine.
_STEPS = (1.3, 1.1, 1.03)
_MOST_ROUNDS = 12


@dataclass(frozen=True)
class Anchors:
    """The anchors of feature maps, as detectron2's DefaultAnchorGenerator makes them.

    Attributes:
        sizes: for each map the square roots of the areas, in pixels of the image.
        ratios: for each map the ratios of height to width.
        strides: pixels of the image from one cell of each map to the next.
        offset: of the centres from the cells' upper left corners, in strides.
    """

    sizes: tuple[tuple[float, ...], ...]
    ratios: tuple[tuple[float, ...], ...]
    strides: tuple[int, ...]
    offset: float = 0.0

    def rounded(self) -> "Anchors":
        """The same with figures that are easy to write, which cover as well."""
        sizes = tuple(
            tuple(float(round(size)) if size >= 20 else round(size, 1) for size in level)
            for level in self.sizes
        )
        ratios = tuple(tuple(round(ratio, 2) for ratio in level) for level in self.ratios)
        return replace(self, sizes=sizes, ratios=ratios)


@dataclass(frozen=True)
class Coverage:
    """How well anchors cover boxes.

    Attributes:
        recall_50, recall_70: the share of boxes that some anchor overlaps with an IoU of at least
            0.5 and 0.7; from 0.7 on the RPN calls an anchor positive for its IoU alone.
        mean: of the boxes' best IoU, which is the recall averaged over all thresholds.
    """

    recall_50: float
    recall_70: float
    mean: float


def coverage(seen: SeenBoxes, anchors: Anchors) -> Coverage:
    """Compares each box with all anchors of its image.

    Args:
        seen: at least one box.
        anchors: of the maps.
    """
    ious = best_ious(seen, anchors)
    return Coverage(float((ious >= 0.5).mean()), float((ious >= 0.7).mean()), float(ious.mean()))


def best_ious(seen: SeenBoxes, anchors: Anchors) -> Floats:
    """(N,): the largest IoU of each box with any anchor at any cell of any map."""
    centres = (seen.boxes[:, :2] + seen.boxes[:, 2:]) / 2
    area = (seen.boxes[:, 2:] - seen.boxes[:, :2]).prod(1)
    best = np.zeros(len(seen))
    levels = zip(anchors.sizes, anchors.ratios, anchors.strides, strict=True)
    for sizes, ratios, stride in levels:
        # Of anchors of one shape, that of the nearest cell overlaps most.
        last = np.ceil(seen.sizes[:, ::-1] / stride) - 1
        cells = np.clip(np.rint(centres / stride - anchors.offset), 0, last)
        middle = (cells + anchors.offset) * stride
        for size in sizes:
            for ratio in ratios:
                half = np.array([size / ratio**0.5, size * ratio**0.5]) / 2
                low = np.maximum(seen.boxes[:, :2], middle - half)
                high = np.minimum(seen.boxes[:, 2:], middle + half)
                common = np.clip(high - low, 0, None).prod(1)
                np.maximum(best, common / (area + size**2 - common), out=best)
    return best


def fit(seen: SeenBoxes, start: Anchors, *, tick: Callable[[], object] = lambda: None) -> Anchors:
    """Anchors with a larger sum of the two recalls and the mean, and neither recall worse for it.

    From quantiles of the boxes' sizes and ratios and from the start, sizes and ratios are changed
    one after the other as long as that helps, and the better end is taken. All maps get the same
    ratios, and no map sizes below those of the map before, as the ROI heads share out boxes. There
    are as many anchors as at the start, on the same maps.

    Args:
        seen: at least one box.
        start: its maps have as many sizes and as many ratios each.
        tick: called after each trial.

    Returns:
        the anchors, rounded; the start itself where nothing better was found.
    """
    before = coverage(seen, start)

    def score(anchors: Anchors) -> float:
        tick()
        now = coverage(seen, anchors)
        lost = max(0.0, before.recall_50 - now.recall_50, before.recall_70 - now.recall_70)
        return now.recall_50 + now.recall_70 + now.mean - 10 * lost

    sides = seen.boxes[:, 2:] - seen.boxes[:, :2]
    levels, count = len(start.sizes), len(start.sizes[0])
    sizes = _quantiles(np.sqrt(sides.prod(1)), levels * count).reshape(levels, count)
    ratios = _quantiles(sides[:, 1] / sides[:, 0], len(start.ratios[0]))
    ends = [
        _climb(_anchors(start, begin, shape), score).rounded()
        for begin, shape in ((sizes, ratios), (np.array(start.sizes), np.array(start.ratios[0])))
    ]
    return max((start, *ends), key=score)


def _quantiles(values: Floats, count: int) -> Floats:
    """The middles of as many equal parts."""
    return np.quantile(values, (np.arange(count) + 0.5) / count)


def _anchors(like: Anchors, sizes: Floats, ratios: Floats) -> Anchors:
    rising = np.sort(sizes, axis=None).reshape(sizes.shape)
    return replace(
        like,
        sizes=tuple(tuple(row.tolist()) for row in rising),
        ratios=(tuple(sorted(ratios.tolist())),) * len(sizes),
    )


def _climb(anchors: Anchors, score: Callable[[Anchors], float]) -> Anchors:
    sizes, ratios = np.array(anchors.sizes), np.array(anchors.ratios[0])
    best = score(anchors)
    for step in _STEPS:
        for _ in range(_MOST_ROUNDS):
            before = best
            for values in (sizes, ratios):
                for place in np.ndindex(values.shape):
                    for factor in (step, 1 / step):
                        old = float(values[place])
                        values[place] = old * factor
                        now = score(_anchors(anchors, sizes, ratios))
                        if now > best:
                            best = now
                        else:
                            values[place] = old
            if best == before:
                break
    return _anchors(anchors, sizes, ratios)
