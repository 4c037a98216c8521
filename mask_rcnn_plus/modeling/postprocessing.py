"""Detections in pixels of the original image, with masks that are pasted only when needed."""

from detectron2.modeling import detector_postprocess
from detectron2.structures import Instances, ROIMasks

from mask_rcnn_plus.modeling.masks import PastedMasks


def postprocess(
    results: Instances, height: int, width: int, mask_threshold: float = 0.5
) -> Instances:
    """detectron2's ``detector_postprocess``, which keeps masks small (:class:`PastedMasks`).

    Args:
        results: what a model's ``inference(..., do_postprocess=False)`` returns for an image, in
            pixels of the network's input: ``pred_boxes``, and optionally ``pred_masks`` of shape
            (R, 1, M, M) or ROIMasks. May be changed in place.
        height, width: the size of the original image, in pixels.
        mask_threshold: a pixel belongs to the object where the mask reaches this value.

    Returns:
        the detections whose boxes have an area in the original image, in its pixels;
        ``pred_masks`` is :class:`PastedMasks`.
    """
    fields = dict(results.get_fields())
    masks = fields.pop("pred_masks", None)
    if masks is None:
        return detector_postprocess(results, height, width, mask_threshold)
    # Under another name, detectron2 drops masks with their boxes and does not paste them.
    masks = masks.tensor if isinstance(masks, ROIMasks) else masks[:, 0]
    detections = Instances(results.image_size, **fields, small_masks=masks)
    detections = detector_postprocess(detections, height, width, mask_threshold)
    masks = detections.small_masks
    detections.remove("small_masks")
    # A copy, so that the masks stay in place when a caller moves the boxes.
    boxes = detections.pred_boxes.tensor.clone()
    detections.pred_masks = PastedMasks(masks, boxes, (height, width), mask_threshold)
    return detections
