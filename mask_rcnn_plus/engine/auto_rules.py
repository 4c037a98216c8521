"""The rules for settings from the training data, one for each key in AUTO.

docs/auto_settings.md explains them. They use numbers and sizes of images and objects, which the
records contain; no image is read.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.structures import BoxMode

from mask_rcnn_plus.config.values import AUTO, is_auto
from mask_rcnn_plus.data.anchors import config_anchors, coverage, fit, seen_boxes
from mask_rcnn_plus.data.augmentation import build_augmentations
from mask_rcnn_plus.errors import UserError

Records = Sequence[dict[str, Any]]

_STEP = 32  # image sizes are multiples of it
# Shorter sides of images to train on from random weights, and to test on.
_SMALLEST, _LARGEST, _LARGEST_TEST = 256, 384, 800
_WANTED = 64  # pixels: the size of the median object
_WINDOW = 256  # pixels: the shorter side of a window of a larger image
_ENLARGED = 2  # at most
_SAMPLED = 4000  # images whose objects are measured
_FITTED = 1000  # boxes that anchors are fitted to
_GAIN = 0.03  # of the recall at IoU 0.5, for which fitted anchors are used


@dataclass(frozen=True)
class Data:
    """What the rules need to know about DATASETS.TRAIN; crowds do not count.

    Attributes:
        records: the images that the training uses.
        tests: the number of images in DATASETS.TEST.
    """

    records: Records
    tests: int

    @cached_property
    def densest(self) -> int:
        """The number of objects in the image with most of them."""
        return max(len(objects_of(record)) for record in self.records)

    @cached_property
    def shares(self) -> list[float]:
        """For each class with objects, the share of the images that show it; rising."""
        counts: Counter[int] = Counter()
        for record in self.records:
            counts.update({o["category_id"] for o in objects_of(record)})
        return sorted(count / len(self.records) for count in counts.values())

    @cached_property
    def sample(self) -> Records:
        """At most 4000 of the images, evenly spaced."""
        return self.records[:: math.ceil(len(self.records) / _SAMPLED)]

    @cached_property
    def shorter_side(self) -> float:
        """The median of the images' shorter sides, in pixels."""
        return float(np.median([shorter_side_of(record) for record in self.sample]))

    @cached_property
    def largest_for_windows(self) -> float:
        """The largest shorter side at which windows suit: they show objects, and show them whole.

        A window shows 1.5 objects on average, and 9 of 10 objects are at most half as wide.
        """
        objects = float(np.mean([len(objects_of(record)) for record in self.sample]))
        return min(_WINDOW * math.sqrt(objects / 1.5), _WINDOW / 2 / max(self.sizes[1], 1e-4))

    @cached_property
    def sizes(self) -> tuple[float, float]:
        """Median and 9th decile of the objects' sizes: root of the box's area / shorter side."""
        sizes = [size for record in self.sample for size in sizes_of(record)] or [1.0]
        median, large = np.quantile(sizes, (0.5, 0.9))
        return max(float(median), 1e-4), float(large)


Rule = Callable[[CfgNode, Data], tuple[Any, str]]
"""The value of a key, and the reason for it. The keys before it in AUTO already have values."""


def _test_size(cfg: CfgNode, data: Data) -> tuple[int, str]:
    if not is_auto(cfg.INPUT.MIN_SIZE_TRAIN):
        return max(cfg.INPUT.MIN_SIZE_TRAIN), "the largest MIN_SIZE_TRAIN"
    own, (size, _) = data.shorter_side, data.sizes
    wanted = max(_WANTED / size, min(_SMALLEST, own))
    side = _rounded(min(wanted, _LARGEST, _ENLARGED * own))
    if cfg.INPUT.CROP.ENABLED and is_auto(cfg.INPUT.CROP.SIZE):
        windowed = min(wanted, _LARGEST_TEST, _ENLARGED * own, data.largest_for_windows)
        side = max(side, _rounded(windowed))
    return side, (
        f"the median object is {size:.1%} of the shorter side of its image ({own:.0f} pixels): "
        f"{size * side:.0f} pixels at this size"
    )


def _crop_size(cfg: CfgNode, data: Data) -> tuple[tuple[float, float], str]:
    side = cfg.INPUT.MIN_SIZE_TEST
    if not _LARGEST <= side <= data.largest_for_windows + _STEP:
        return (1.0, 1.0), "whole images: small enough, or windows would cut or miss objects"
    share = round(_WINDOW / side, 3)
    return (share, share), f"windows of {_WINDOW} pixels at the scale of MIN_SIZE_TEST"


def _train_sizes(cfg: CfgNode, data: Data) -> tuple[tuple[int, ...], str]:
    side, crop = cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.CROP
    if not side:
        return (0,), "MIN_SIZE_TEST keeps the images' own sizes, too"
    if crop.ENABLED and crop.TYPE == "relative":
        side = side * min(crop.SIZE)
    sizes = tuple(range(_rounded(0.75 * side), _rounded(1.1 * side) + 1, _STEP))
    return sizes, f"about 0.75 to 1.1 times {side:.0f}, for a variety of sizes"


def _longer_side(key: str) -> Rule:
    def rule(cfg: CfgNode, data: Data) -> tuple[int, str]:
        shorter = get_value(cfg, key)
        longest = max(shorter if isinstance(shorter, list | tuple) else [shorter])
        return math.ceil(longest * 5 / 3) or 1333, f"5/3 of {key.split('.')[1]}, as for COCO"

    return rule


def _anchor_sizes(cfg: CfgNode, data: Data) -> tuple[list[list[float]], str]:
    start = config_anchors(cfg)
    value = [list(level) for level in start.sizes]
    few = data.records[:: math.ceil(len(data.records) / _FITTED)]
    seen = seen_boxes(few, build_augmentations(cfg), seed=max(0, cfg.SEED))
    seen = seen.some(_FITTED, seed=max(0, cfg.SEED))
    if not len(seen):
        return value, "4 cells of each feature map"
    before, fitted = coverage(seen, start), fit(seen, start, fit_ratios=False)
    after = coverage(seen, fitted)
    recalls = f"{before.recall_50:.0%} to {after.recall_50:.0%}"
    # Recall at 0.7 can rise a lot, but then all maps have anchors of similar sizes: no AP gained.
    if after.recall_50 - before.recall_50 < _GAIN:
        return (
            value,
            f"4 cells of each feature map; fitting changes recall at IoU 0.5 from {recalls}",
        )
    value = [list(level) for level in fitted.sizes]
    return value, f"fitted: recall at IoU 0.5 rises from {recalls}"


def _repeat_threshold(cfg: CfgNode, data: Data) -> tuple[float, str]:
    middle = float(np.median(data.shares))
    threshold = round(middle / 2, 4)
    rare = sum(share < threshold for share in data.shares)
    if not rare:
        return 0.0, "no class is in less than half as many images as the median class"
    return threshold, (
        f"half the share of images with the median class, {middle:.0%}; {rare} of "
        f"{len(data.shares)} classes are rarer"
    )


def _max_iter(cfg: CfgNode, data: Data) -> tuple[int, str]:
    images, batch = len(data.records), cfg.SOLVER.IMS_PER_BATCH
    pretrained = bool(cfg.MODEL.WEIGHTS or cfg.MODEL.TIMM.PRETRAINED)
    shown = images_to_see(images)
    if pretrained:
        objects = float(np.mean([len(objects_of(record)) for record in data.sample]))
        shown = images_to_see_pretrained(images, objects=objects)
    iterations = math.ceil(shown / batch)
    epochs = iterations * batch / images
    return iterations, (
        f"{epochs:.{0 if epochs >= 10 else 1}f} epochs of {images} images in batches of {batch}"
    )


def images_to_see(images: int) -> float:
    """How many images a training from random weights shows, repetitions included.

    Few images are shown more often, but there is a least length that random weights need to get
    anywhere. Many images are shown for 12 epochs, as in COCO's 1x.
    """
    return max(2400, 300 * math.sqrt(images), 12 * images)


def images_to_see_pretrained(images: int, *, objects: float) -> float:
    """The same for pretrained weights, which need less, and still less if images are dense.

    Args:
        images: the number of training images.
        objects: the mean number of objects per image.
    """
    shown = max(600, 75 * math.sqrt(images), 6 * images)
    return max(500, shown * min(1, math.sqrt(12 / objects)))


def _steps(cfg: CfgNode, data: Data) -> tuple[tuple[int, ...], str]:
    steps = {round(cfg.SOLVER.MAX_ITER * share) for share in (2 / 3, 8 / 9)}
    return tuple(sorted(steps - {0})), "2/3 and 8/9 of MAX_ITER, as for COCO"


def _warmup(cfg: CfgNode, data: Data) -> tuple[int, str]:
    return min(1000, cfg.SOLVER.MAX_ITER // 10), "a tenth of MAX_ITER, at most 1000"


def _checkpoint_period(cfg: CfgNode, data: Data) -> tuple[int, str]:
    return min(5000, math.ceil(cfg.SOLVER.MAX_ITER / 4)), "a quarter of MAX_ITER, at most 5000"


def _eval_period(cfg: CfgNode, data: Data) -> tuple[int, str]:
    if not data.tests:
        return 0, "DATASETS.TEST is empty"
    # A test image takes about a third of the time of a training image of the same size.
    areas = (cfg.INPUT.MIN_SIZE_TEST / float(np.mean(cfg.INPUT.MIN_SIZE_TRAIN) or 1)) ** 2
    evaluation = data.tests / 3 * max(1.0, areas)
    count = int(0.1 * cfg.SOLVER.MAX_ITER * cfg.SOLVER.IMS_PER_BATCH / evaluation)
    count = min(5, max(2, count))
    return math.ceil(cfg.SOLVER.MAX_ITER / count), (
        f"{count} evaluations of {data.tests} images, up to a tenth of the training's time"
    )


def _detections(cfg: CfgNode, data: Data) -> tuple[int, str]:
    most = data.densest
    return min(1000, max(100, math.ceil(1.5 * most / 10) * 10)), (
        f"1.5 times the {most} objects of the densest image, 100 to 1000"
    )


RULES: dict[str, Rule] = dict(
    zip(
        AUTO,
        (
            _test_size,
            _longer_side("INPUT.MIN_SIZE_TEST"),
            _crop_size,
            _train_sizes,
            _longer_side("INPUT.MIN_SIZE_TRAIN"),
            _anchor_sizes,
            _repeat_threshold,
            _max_iter,
            _steps,
            _warmup,
            _checkpoint_period,
            _eval_period,
            _detections,
        ),
        strict=True,
    )
)


def objects_of(record: dict[str, Any]) -> list[dict[str, Any]]:
    return [a for a in record.get("annotations", ()) if not a.get("iscrowd", 0)]


def sizes_of(record: dict[str, Any]) -> list[float]:
    """The roots of the areas of the objects' boxes, as shares of the image's shorter side."""
    boxes = [
        BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in objects_of(record)
    ]
    side = shorter_side_of(record)
    return [math.sqrt(max(0, x1 - x0) * max(0, y1 - y0)) / side for x0, y0, x1, y1 in boxes]


def shorter_side_of(record: dict[str, Any]) -> int:
    if "width" not in record or "height" not in record:
        raise UserError(
            "INPUT.MIN_SIZE_TRAIN is (-1,), but records of DATASETS.TRAIN lack 'width' or 'height':"
            " set MIN_SIZE_TRAIN, MIN_SIZE_TEST, MAX_SIZE_TRAIN and MAX_SIZE_TEST"
        )
    return min(record["width"], record["height"])


def _rounded(side: float) -> int:
    return max(1, round(side / _STEP)) * _STEP


def get_value(cfg: CfgNode, key: str) -> Any:
    return reduce(getattr, key.split("."), cfg)


def set_value(cfg: CfgNode, key: str, value: Any) -> None:
    *groups, name = key.split(".")
    reduce(getattr, groups, cfg)[name] = value
