"""The boxes of a data set at the sizes at which a model sees them, without reading an image."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from detectron2.data import transforms as T
from detectron2.structures import BoxMode

from mask_rcnn_plus.data.seeding import seed_all

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class SeenBoxes:
    """Boxes after augmentation.

    Attributes:
        boxes: (N, 4): x0, y0, x1, y1 in pixels of the augmented image, inside it, none empty.
        sizes: (N, 2): height and width of that image.
    """

    boxes: Floats
    sizes: Floats

    def __len__(self) -> int:
        return len(self.boxes)

    def some(self, most: int, *, seed: int) -> "SeenBoxes":
        """At most so many of them, drawn by the seed."""
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
    """The boxes of all objects but crowds, as augmentations place them.

    What a crop cuts off a box is cut; that a mask may then have a smaller box is not known here.

    Args:
        records: in detectron2's format, with "height" and "width".
        augmentations: those that ask for more of an image than its size must not move boxes.
        seed: of the draws.
        draws: how often each image is augmented.
    """
    boxes: list[Floats] = [np.zeros((0, 4))]
    sizes: list[Floats] = [np.zeros((0, 2))]
    for number, record in enumerate(records):
        given = [
            BoxMode.convert(list(one["bbox"]), one["bbox_mode"], BoxMode.XYXY_ABS)
            for one in record.get("annotations", ())
            if not one.get("iscrowd", 0)
        ]
        if not given:
            continue
        for draw in range(draws):
            seed_all(seed, "boxes", number, draw)
            placed, size = _place(
                np.array(given, np.float64), (record["height"], record["width"]), augmentations
            )
            boxes.append(placed)
            sizes.append(np.tile(np.array(size, np.float64), (len(placed), 1)))
    return SeenBoxes(np.concatenate(boxes), np.concatenate(sizes))


def _place(
    boxes: Floats, size: tuple[int, int], augmentations: Sequence[T.Augmentation]
) -> tuple[Floats, tuple[int, int]]:
    for augmentation in augmentations:
        # Of this size, and without memory of its own.
        image = np.broadcast_to(np.zeros(1, np.uint8), (*size, 3))
        transform = augmentation.get_transform(image)
        boxes = transform.apply_box(boxes)
        size = _size_after(transform, size)
        height, width = size
        boxes = np.clip(boxes, 0, [width, height, width, height])
    kept = (boxes[:, 2:] - boxes[:, :2] > 1e-5).all(1)
    return boxes[kept], size


def _size_after(transform: T.Transform, size: tuple[int, int]) -> tuple[int, int]:
    height, width = size
    if isinstance(transform, T.TransformList):
        for one in transform.transforms:
            size = _size_after(one, size)
        return size
    if isinstance(transform, T.ResizeTransform):
        return transform.new_h, transform.new_w
    if isinstance(transform, T.CropTransform):
        return (
            min(transform.h, height - transform.y0),
            min(transform.w, width - transform.x0),
        )
    if isinstance(transform, T.PadTransform):
        return (
            height + transform.y0 + transform.y1,
            width + transform.x0 + transform.x1,
        )
    return size
