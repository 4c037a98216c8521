"""Masks and detections in COCO's json format; masks are encoded without pasting them first."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
from detectron2.evaluation import coco_evaluation
from detectron2.structures import Instances

from mask_rcnn_plus.modeling import PastedMasks, RunLengthMasks


def encoded_masks(masks: Any) -> list[dict[str, Any]]:
    """Each mask in COCO's run-length encoding, ``{"size": [H, W], "counts": bytes}``.

    Args:
        masks: PastedMasks or RunLengthMasks; or R masks (H, W) on the CPU, with values 0 and 1.
    """
    if isinstance(masks, PastedMasks | RunLengthMasks):
        return masks.rle()
    # np.asarray first: asfortranarray with a dtype warns about a tensor.
    return [mask_util.encode(np.asfortranarray(np.asarray(m), dtype=np.uint8)) for m in masks]


def segmentation_to_rle(segmentation: Any, height: int, width: int) -> Mapping[str, Any]:
    """Polygons, run lengths (compressed or not) or a bitmap (H, W) in COCO's run-length encoding.

    The height and width are those of the image in pixels.
    """
    if isinstance(segmentation, np.ndarray):
        return encoded_masks([segmentation])[0]
    if isinstance(segmentation, dict) and not isinstance(segmentation["counts"], list):
        return segmentation
    rles = mask_util.frPyObjects(segmentation, height, width)
    return mask_util.merge(rles) if isinstance(rles, list) else rles


def instances_to_coco_json(instances: Instances, image_id: Any) -> list[dict[str, Any]]:
    """Like detectron2's function of this name, but does not change ``instances``.

    Args:
        instances: the detections of one image, on the CPU, in pixels of the image.
    """
    fields = dict(instances.get_fields())
    masks = fields.pop("pred_masks", None)
    if "pred_keypoints" in fields:
        # detectron2 moves them in place.
        fields["pred_keypoints"] = fields["pred_keypoints"].clone()
    without_masks = Instances(instances.image_size, **fields)
    detections = coco_evaluation.instances_to_coco_json(without_masks, image_id)
    if masks is None:
        return detections
    with_masks = []
    for detection, rle in zip(detections, encoded_masks(masks), strict=True):
        # json does not support bytes. Keypoints come last, as in detectron2's files.
        segmentation = {"size": list(rle["size"]), "counts": rle["counts"].decode("ascii")}
        keypoints = {k: detection.pop(k) for k in ("keypoints",) if k in detection}
        with_masks.append({**detection, "segmentation": segmentation, **keypoints})
    return with_masks
