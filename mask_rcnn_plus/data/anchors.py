"""The boxes of a data set as a model sees them, and how well anchors cover them."""

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from detectron2.config import CfgNode
from detectron2.data import transforms as T
from detectron2.modeling import build_anchor_generator, build_backbone
from detectron2.structures import BoxMode

from mask_rcnn_plus.config.values import is_auto
from mask_rcnn_plus.data.seeding import seed_all
from mask_rcnn_plus.errors import UserError

Floats = npt.NDArray[np.float64]

# Factors by which the search changes one size or ratio, coarse to fine.
_FACTORS = (1.3, 1.1, 1.03)
_MAX_ROUNDS = 12


@dataclass(frozen=True)
class SeenBoxes:
    """Boxes after augmentation.

    Attributes:
        boxes: (N, 4): x0, y0, x1, y1 in pixels of the augmented image, inside it and not empty.
        sizes: (N, 2): height and width of that image.
    """

    boxes: Floats
    sizes: Floats

    def __len__(self) -> int:
        return len(self.boxes)

    def some(self, most: int, *, seed: int) -> "SeenBoxes":
        """A random choice of at most this many, determined by the seed."""
        if len(self) <= most:
            return self
        seed_all(seed, "boxes")
        chosen = np.random.permutation(len(self))[:most]
        return SeenBoxes(self.boxes[chosen], self.sizes[chosen])


def seen_boxes(
    records: Iterable[dict[str, Any]],
    augmentations: Sequence[T.Augmentation],
    *,
    seed: int,
    draws: int = 1,
) -> SeenBoxes:
    """The boxes of all objects except crowds after augmentation. No image is read.

    A box is cut where a crop cuts it; the box of the remaining mask may be smaller.

    Args:
        records: in detectron2's format, with "height" and "width".
        augmentations: those that move boxes must depend only on the image's size.
        seed: determines the draws.
        draws: how often each image is augmented.
    """
    boxes: list[Floats] = [np.zeros((0, 4))]
    sizes: list[Floats] = [np.zeros((0, 2))]
    for number, record in enumerate(records):
        corners = [
            BoxMode.convert(list(a["bbox"]), a["bbox_mode"], BoxMode.XYXY_ABS)
            for a in record.get("annotations", ())
            if not a.get("iscrowd", 0)
        ]
        for draw in range(draws if corners else 0):
            seed_all(seed, "boxes", number, draw)
            size = (record["height"], record["width"])
            augmented, size = _augment(np.array(corners, np.float64), size, augmentations)
            boxes.append(augmented)
            sizes.append(np.tile(np.array(size, np.float64), (len(augmented), 1)))
    return SeenBoxes(np.concatenate(boxes), np.concatenate(sizes))


def _augment(
    boxes: Floats, size: tuple[int, int], augmentations: Sequence[T.Augmentation]
) -> tuple[Floats, tuple[int, int]]:
    for augmentation in augmentations:
        # An image of this size without memory.
        transform = augmentation.get_transform(np.broadcast_to(np.uint8(0), (*size, 3)))
        boxes = transform.apply_box(boxes)
        height, width = size = _size_after(transform, size)
        boxes = np.clip(boxes, 0, [width, height, width, height])
    return boxes[(boxes[:, 2:] - boxes[:, :2] > 1e-5).all(1)], size


def _size_after(transform: T.Transform, size: tuple[int, int]) -> tuple[int, int]:
    height, width = size
    if isinstance(transform, T.TransformList):
        for part in transform.transforms:
            size = _size_after(part, size)
        return size
    if isinstance(transform, T.ResizeTransform):
        return transform.new_h, transform.new_w
    if isinstance(transform, T.CropTransform):
        return min(transform.h, height - transform.y0), min(transform.w, width - transform.x0)
    if isinstance(transform, T.PadTransform):
        return height + transform.y0 + transform.y1, width + transform.x0 + transform.x1
    return size


@dataclass(frozen=True)
class Anchors:
    """The anchors that detectron2's DefaultAnchorGenerator makes for some feature maps.

    Attributes:
        sizes: for each map the square roots of the areas, in pixels of the image.
        ratios: for each map the ratios of height to width.
        strides: for each map the distance between cells, in pixels of the image.
        offset: the distance of the centres from the cells' upper left corners, in strides.
    """

    sizes: tuple[tuple[float, ...], ...]
    ratios: tuple[tuple[float, ...], ...]
    strides: tuple[int, ...]
    offset: float = 0.0

    def rounded(self) -> "Anchors":
        """The same anchors with short numbers, which cover the boxes as well."""
        sizes = tuple(
            tuple(float(round(size)) if size >= 20 else round(size, 1) for size in level)
            for level in self.sizes
        )
        ratios = tuple(tuple(round(ratio, 2) for ratio in level) for level in self.ratios)
        return replace(self, sizes=sizes, ratios=ratios)


def config_anchors(cfg: CfgNode) -> Anchors:
    """The anchors of a config's RPN. Sizes [[-1]] are four cells of each feature map, as for COCO.

    Raises:
        UserError: the anchors have another type, or their number differs between feature maps.
    """
    generator = cfg.MODEL.ANCHOR_GENERATOR
    if generator.NAME != "DefaultAnchorGenerator":
        raise UserError(
            f"MODEL.ANCHOR_GENERATOR.NAME is '{generator.NAME}': can fit only "
            "DefaultAnchorGenerator"
        )
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.TIMM.PRETRAINED = False  # the weights do not matter
    maps = build_backbone(cfg).output_shape()
    missing = [name for name in cfg.MODEL.RPN.IN_FEATURES if name not in maps]
    if missing:
        raise UserError(
            f"MODEL.RPN.IN_FEATURES names '{missing[0]}'; the backbone has {', '.join(maps)}"
        )
    shapes = [maps[name] for name in cfg.MODEL.RPN.IN_FEATURES]
    levels = len(shapes)
    strides = tuple(int(shape.stride) for shape in shapes)
    if is_auto(generator.SIZES):
        generator = cfg.MODEL.ANCHOR_GENERATOR
        generator.SIZES = [[4 * stride] for stride in strides]
    try:
        build_anchor_generator(cfg, shapes)
    except AssertionError as error:
        raise UserError(
            "MODEL.ANCHOR_GENERATOR.SIZES and ASPECT_RATIOS must be lists of 1 list, or of "
            f"{levels}: one per name in MODEL.RPN.IN_FEATURES"
        ) from error

    def per_level(values: Sequence[Any]) -> tuple[tuple[float, ...], ...]:
        """Repeats a single list for all feature maps, as detectron2 does."""
        lists = values if isinstance(values[0], list | tuple) else [values]
        rows = [tuple(float(value) for value in row) for row in lists]
        return tuple(rows * levels if len(rows) == 1 else rows)

    sizes, ratios = per_level(generator.SIZES), per_level(generator.ASPECT_RATIOS)
    if len(set(map(len, sizes))) > 1 or len(set(map(len, ratios))) > 1:
        raise UserError(
            "MODEL.ANCHOR_GENERATOR: SIZES and ASPECT_RATIOS must have the same number of values "
            "on each feature map"
        )
    return Anchors(sizes, ratios, strides, float(generator.OFFSET))


@dataclass(frozen=True)
class Coverage:
    """The quality of anchors for a set of boxes.

    Attributes:
        recall_50, recall_70: the share of boxes that have an IoU of at least 0.5 and 0.7 with some
            anchor. From 0.7, the RPN labels an anchor positive regardless of other anchors.
        mean: the mean of the boxes' best IoU, which is the recall averaged over all thresholds.
    """

    recall_50: float
    recall_70: float
    mean: float


def coverage(seen: SeenBoxes, anchors: Anchors) -> Coverage:
    """Compares each box, of at least one, with all anchors of its image."""
    ious = best_ious(seen, anchors)
    return Coverage(float((ious >= 0.5).mean()), float((ious >= 0.7).mean()), float(ious.mean()))


def best_ious(seen: SeenBoxes, anchors: Anchors) -> Floats:
    """The largest IoU of each box with any anchor at any cell of any map, (N,)."""
    centres = (seen.boxes[:, :2] + seen.boxes[:, 2:]) / 2
    area = (seen.boxes[:, 2:] - seen.boxes[:, :2]).prod(1)
    best = np.zeros(len(seen))
    for sizes, ratios, stride in zip(anchors.sizes, anchors.ratios, anchors.strides, strict=True):
        # Among anchors of one shape, the one at the nearest cell has the largest IoU.
        last = np.ceil(seen.sizes[:, ::-1] / stride) - 1
        cells = np.clip(np.rint(centres / stride - anchors.offset), 0, last)
        middle = (cells + anchors.offset) * stride
        for size, ratio in itertools.product(sizes, ratios):
            half = np.array([size / ratio**0.5, size * ratio**0.5]) / 2
            low = np.maximum(seen.boxes[:, :2], middle - half)
            high = np.minimum(seen.boxes[:, 2:], middle + half)
            common = np.clip(high - low, 0, None).prod(1)
            np.maximum(best, common / (area + size**2 - common), out=best)
    return best


def fit(
    seen: SeenBoxes,
    start: Anchors,
    *,
    fit_ratios: bool = True,
    tick: Callable[[], object] = lambda: None,
) -> Anchors:
    """Searches for anchors with a larger sum of both recalls and the mean, and no lower recall.

    The search starts from quantiles of the boxes' sizes and ratios, and from ``start``. It changes
    one size or ratio after the other while that helps. All maps get the same ratios, and no map has
    smaller sizes than the map before, since the ROI heads assign boxes to maps by size.

    Args:
        seen: at least one box.
        start: has the same number of sizes and ratios on each map.
        fit_ratios: False keeps those of the start.
        tick: called before each trial.

    Returns:
        the better result, rounded; ``start`` itself if nothing is better.
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
    ratios = own_ratios = np.array(start.ratios[0])
    if fit_ratios:
        ratios = _quantiles(sides[:, 1] / sides[:, 0], len(own_ratios))
    results = [
        _climb(_with_values(start, *values), score, fit_ratios).rounded()
        for values in ((sizes, ratios), (np.array(start.sizes), own_ratios))
    ]
    return max((start, *results), key=score)


def _quantiles(values: Floats, count: int) -> Floats:
    """The middles of ``count`` equal parts."""
    return np.quantile(values, (np.arange(count) + 0.5) / count)


def _with_values(anchors: Anchors, sizes: Floats, ratios: Floats) -> Anchors:
    rising = np.sort(sizes, axis=None).reshape(sizes.shape)
    return replace(
        anchors,
        sizes=tuple(tuple(row.tolist()) for row in rising),
        ratios=(tuple(sorted(ratios.tolist())),) * len(sizes),
    )


def _climb(anchors: Anchors, score: Callable[[Anchors], float], fit_ratios: bool) -> Anchors:
    sizes, ratios = np.array(anchors.sizes), np.array(anchors.ratios[0])
    free = (sizes, ratios) if fit_ratios else (sizes,)
    places = [(values, place) for values in free for place in np.ndindex(values.shape)]
    best = score(anchors)
    for step in _FACTORS:
        for _ in range(_MAX_ROUNDS):
            before = best
            for (values, place), factor in itertools.product(places, (step, 1 / step)):
                old = float(values[place])
                values[place] = old * factor
                now = score(_with_values(anchors, sizes, ratios))
                if now > best:
                    best = now
                else:
                    values[place] = old
            if best == before:
                break
    return _with_values(anchors, sizes, ratios)
