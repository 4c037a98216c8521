"""Detections at the size of the original image, their masks pasted when somebody asks for them."""

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.layers import paste_masks_in_image
from detectron2.modeling import detector_postprocess
from detectron2.structures import Instances, ROIMasks
from torch import Tensor

from mask_rcnn_plus.modeling.masks_on_demand import MasksOnDemand
from mask_rcnn_plus.ops import paste_masks_rle


class PastedMasks(MasksOnDemand):
    """R masks in an image, kept as they came from the mask head: R small squares and their boxes.

    :meth:`rle` encodes them without an image of a mask; :meth:`to_tensor`, NumPy, indexing with a
    number and iteration give what detectron2 would have pasted, the last two one mask at a time.

    Attributes:
        masks: (R, M, M), fp32.
        boxes: (R, 4), rows of (x0, y0, x1, y1) in pixels of the image.
        image_size: (H, W) in pixels.
        threshold: the value from which on a pixel belongs to the object.
    """

    def __init__(
        self, masks: Tensor, boxes: Tensor, image_size: tuple[int, int], threshold: float = 0.5
    ) -> None:
        """
        Args:
            masks: (R, M, M); fp16 and bf16 become fp32 here, so that the pixels that are sampled
                are not rounded to the masks' dtype.
            boxes, image_size, threshold: the attributes.

        Raises:
            ValueError: there are not as many boxes as masks.
        """
        if len(masks) != len(boxes):
            raise ValueError(f"{len(masks)} masks need as many boxes, got {len(boxes)}")
        self.masks, self.boxes = masks.float(), boxes
        self.image_size = (int(image_size[0]), int(image_size[1]))
        self.threshold = threshold
        self._rle: list[dict[str, Any]] | None = None

    def rle(self) -> list[dict[str, Any]]:
        """COCO's run-length encoding of each mask: ``{"size": [H, W], "counts": bytes}``.

        Worked out once; do not change it in place. On the CPU it is, byte for byte, the encoding of
        what :meth:`to_tensor` gives.
        """
        if self._rle is None:
            size, threshold = self.image_size, self.threshold
            self._rle = paste_masks_rle(self.masks, self.boxes, size, threshold)
        return self._rle

    def to_tensor(self) -> Tensor:
        """All masks, bool (R, H, W), on the device of the small ones; detectron2's paste."""
        if len(self) == 0:
            return self.masks.new_zeros((0, *self.image_size), dtype=torch.bool)
        return paste_masks_in_image(self.masks, self.boxes, self.image_size, self.threshold)

    def _moved(self, *args: Any, **kwargs: Any) -> "PastedMasks":
        masks, boxes = self.masks.to(*args, **kwargs), self.boxes.to(*args, **kwargs)
        if masks is self.masks and boxes is self.boxes:
            return self
        return PastedMasks(masks, boxes, self.image_size, self.threshold)

    @property
    def device(self) -> torch.device:
        return self.masks.device

    def __len__(self) -> int:
        return len(self.masks)

    def _one(self, number: int) -> Tensor:
        return self._chosen(slice(number, number + 1)).to_tensor()[0]

    def _chosen(self, item: Any) -> "PastedMasks":
        return PastedMasks(self.masks[item], self.boxes[item], self.image_size, self.threshold)

    @staticmethod
    def cat(parts: Sequence["PastedMasks"]) -> "PastedMasks":
        """Masks of one image, one behind the other; for ``Instances.cat``.

        Raises:
            ValueError: they are of images of different sizes, or differ in their threshold.
        """
        kinds = {(part.image_size, part.threshold) for part in parts}
        if len(kinds) != 1:
            raise ValueError(f"masks of different (image size, threshold) to join: {kinds}")
        masks = torch.cat([part.masks for part in parts])
        return PastedMasks(masks, torch.cat([part.boxes for part in parts]), *kinds.pop())

    def __repr__(self) -> str:
        return f"PastedMasks(shape={tuple(self.shape)}, masks of {tuple(self.masks.shape[1:])})"


def postprocess(
    results: Instances, height: int, width: int, mask_threshold: float = 0.5
) -> Instances:
    """detectron2's ``detector_postprocess``, with masks that are pasted when somebody asks.

    Args:
        results: what a model's ``inference(..., do_postprocess=False)`` gives for an image, in
            pixels of the network's input: ``pred_boxes``; ``pred_masks``, where there are any,
            (R, 1, M, M) or ROIMasks. May be changed in place.
        height, width: of the original image, in pixels.
        mask_threshold: the value from which on a pixel belongs to the object.

    Returns:
        the detections whose boxes have an area in the original image, in its pixels;
        ``pred_masks`` is :class:`PastedMasks`.
    """
    fields = dict(results.get_fields())
    masks = fields.pop("pred_masks", None)
    if masks is None:
        return detector_postprocess(results, height, width, mask_threshold)
    # Under another name they are dropped with their boxes, and otherwise left alone.
    masks = masks.tensor if isinstance(masks, ROIMasks) else masks[:, 0]
    bare = Instances(results.image_size, **fields, masks_of_boxes=masks)
    bare = detector_postprocess(bare, height, width, mask_threshold)
    masks = bare.masks_of_boxes
    bare.remove("masks_of_boxes")
    # Whoever moves the boxes later must not move the masks.
    boxes = bare.pred_boxes.tensor.clone()
    bare.pred_masks = PastedMasks(masks, boxes, (height, width), mask_threshold)
    return bare
