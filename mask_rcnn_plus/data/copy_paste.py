"""Pastes objects of one training image onto another (Ghiasi et al., arXiv:2012.07177)."""

from typing import Any

import numpy as np
import torch
from detectron2.structures import BitMasks, Boxes, Instances, Keypoints

from mask_rcnn_plus.errors import UserError

Sample = dict[str, Any]


class CopyPaste:
    """Pastes a random choice of objects at a random place. Draws from NumPy's global generator.

    Crowds are neither pasted nor cut, because detectron2's mapper removes them from a sample.

    Args:
        probability: the share of samples that get objects, 0 to 1.
        max_objects: the number of pasted objects is drawn from 1 to this.
    """

    def __init__(self, *, probability: float, max_objects: int) -> None:
        self._probability = probability
        self._max_objects = max_objects

    def wanted(self) -> bool:
        """Draws whether the next sample gets objects."""
        return bool(np.random.rand() < self._probability)

    def __call__(self, sample: Sample, other: Sample) -> Sample:
        """Returns the sample with objects of another one.

        Args:
            sample: from a mapper, with "image" (C, H, W) and "instances".
            other: another sample of any size. A smaller one is placed inside the sample; a part of
                a larger one covers the whole sample.

        Raises:
            UserError: masks are missing, or they are polygons.
        """
        count = len(other["instances"])
        if not count:
            return sample
        pasted = np.random.randint(1, min(count, self._max_objects) + 1)
        chosen = np.random.permutation(count)[:pasted]
        # From a common upper left corner to a common lower right corner.
        differences = np.subtract(sample["image"].shape[1:], other["image"].shape[1:])
        top, left = (np.random.randint(min(0, d), max(0, d) + 1) for d in differences.tolist())
        return paste(sample, other, torch.from_numpy(chosen), (top, left))


def paste(sample: Sample, other: Sample, chosen: torch.Tensor, place: tuple[int, int]) -> Sample:
    """Pastes objects of one sample onto another.

    Masks below lose what is covered, and their boxes are recomputed from the rest. Objects that are
    completely covered, or outside the image, are removed.

    Args:
        sample: with "image" (C, H, W) and "instances"; not changed.
        other: the same, with size (C, h, w).
        chosen: indices of the objects to paste.
        place: (y, x) of the other's upper left corner in the sample, in pixels; may be negative.

    Returns:
        a new sample: its own instances first, then the pasted ones.

    Raises:
        UserError: masks are missing, or they are polygons.
    """
    own, source = sample["instances"], other["instances"][chosen]
    (height, width), (top, left) = own.image_size, place
    rows = slice(max(0, top), min(height, top + source.image_size[0]))
    columns = slice(max(0, left), min(width, left + source.image_size[1]))
    there = np.s_[:, rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]
    before = _masks(source)
    masks = before.new_zeros(len(source), height, width)
    masks[:, rows, columns] = before[there]
    pasted = _moved(source, place, (height, width))
    if before[there].shape == before.shape:
        pasted.gt_masks = BitMasks(masks)
    else:
        pasted = _remasked(pasted, masks, _areas(before) != _areas(masks))
    covered = masks.any(0)

    image = sample["image"].clone()
    image[:, rows, columns] = torch.where(
        covered[rows, columns], other["image"][there], image[:, rows, columns]
    )
    if len(own):
        own = _remasked(_hidden_points(own, covered), *_uncovered(_masks(own), covered))
        pasted = Instances.cat([own, pasted])
    return {**sample, "image": image, "instances": pasted}


def _uncovered(masks: torch.Tensor, covered: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Removes the covered pixels from masks (R, H, W); also returns which (R,) have lost any."""
    ys, xs = (torch.nonzero(covered.any(axis))[:, 0] for axis in (1, 0))
    if not len(ys):
        return masks, torch.zeros(len(masks), dtype=torch.bool)
    # Most of a large image is not affected.
    window = np.s_[:, ys[0] : ys[-1] + 1, xs[0] : xs[-1] + 1]
    cut = (masks[window] & covered[window[1:]]).flatten(1).any(1)
    masks = masks.clone()
    masks[window] &= ~covered[window[1:]]
    return masks, cut


def _masks(instances: Instances) -> torch.Tensor:
    if not instances.has("gt_masks") or not isinstance(instances.gt_masks, BitMasks):
        raise UserError(
            "INPUT.COPY_PASTE needs masks as bitmaps: set MODEL.MASK_ON True, and "
            "INPUT.MASK_FORMAT bitmask with a mapper of your own"
        )
    return instances.gt_masks.tensor


def _areas(masks: torch.Tensor) -> torch.Tensor:
    # Many times faster than torch's sum of bools.
    return torch.tensor([np.count_nonzero(mask) for mask in masks.numpy()])


def _copy(instances: Instances, size: tuple[int, int]) -> Instances:
    return Instances(size, **instances.get_fields())


def _moved(instances: Instances, place: tuple[int, int], size: tuple[int, int]) -> Instances:
    """Moves boxes and keypoints to their place in an image of this size. Masks do not move."""
    result = _copy(instances, size)
    shift = torch.tensor([place[1], place[0]], dtype=torch.float32)
    result.gt_boxes = Boxes(instances.gt_boxes.tensor + shift.repeat(2))
    result.gt_boxes.clip(size)
    if instances.has("gt_keypoints"):
        points = instances.gt_keypoints.tensor.clone()
        points[..., :2] += shift
        inside = (points[..., :2] >= 0) & (points[..., :2] <= torch.tensor([size[1], size[0]]))
        # COCO's values of an unlabelled point.
        points[~(inside.all(-1) & (points[..., 2] > 0))] = 0
        result.gt_keypoints = Keypoints(points)
    return result


def _hidden_points(instances: Instances, covered: torch.Tensor) -> Instances:
    """Labels covered keypoints with COCO's 1 instead of 2."""
    if not instances.has("gt_keypoints"):
        return instances
    result = _copy(instances, instances.image_size)
    points = instances.gt_keypoints.tensor.clone()
    x, y = points[..., 0].long(), points[..., 1].long()
    hidden = covered[y.clamp(0, covered.shape[0] - 1), x.clamp(0, covered.shape[1] - 1)]
    points[..., 2] = torch.where(hidden, points[..., 2].clamp(max=1), points[..., 2])
    result.gt_keypoints = Keypoints(points)
    return result


def _remasked(instances: Instances, masks: torch.Tensor, cut: torch.Tensor) -> Instances:
    """Replaces the masks of R objects and removes objects with empty ones.

    Args:
        masks: (R, H, W) bool.
        cut: (R,) bool: the objects that have lost pixels. Only their boxes are recomputed.
    """
    result = _copy(instances, instances.image_size)
    result.gt_masks = BitMasks(masks)
    if not cut.any():
        return result
    rest = BitMasks(masks[cut])
    boxes = instances.gt_boxes.tensor.clone()
    boxes[cut] = rest.get_bounding_boxes().tensor
    result.gt_boxes = Boxes(boxes)
    kept = ~cut
    kept[cut] = rest.nonempty()
    return result[kept]
