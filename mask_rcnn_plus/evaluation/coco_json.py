"""Detections in COCO's json form, their masks encoded without an image of each."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
from detectron2.evaluation import coco_evaluation
from detectron2.structures import Instances

from mask_rcnn_plus.errors import UserError
from mask_rcnn_plus.modeling import PastedMasks, RunLengthMasks


def encoded_masks(masks: Any) -> list[dict[str, Any]]:
    """COCO's run-length encoding, ``{"size": [H, W], "counts": bytes}``, of each mask.

    Args:
        masks: PastedMasks or RunLengthMasks, which need no image of a mask; or R masks (H, W) of
            the CPU, 0 or 1.
    """
    if isinstance(masks, PastedMasks | RunLengthMasks):
        return masks.rle()
    # np.asarray first: of a tensor, asfortranarray with a dtype would warn.
    return [mask_util.encode(np.asfortranarray(np.asarray(m), dtype=np.uint8)) for m in masks]


def instances_to_coco_json(instances: Instances, image_id: Any) -> list[dict[str, Any]]:
    """detectron2's function of this name: the same entries, and nothing in ``instances`` changes.

    Args:
        instances: of one image, on the CPU, in its pixels.
        image_id: of the image.
    """
    fields = dict(instances.get_fields())
    masks = fields.pop("pred_masks", None)
    if "pred_keypoints" in fields:
        # detectron2 moves them in place.
        fields["pred_keypoints"] = fields["pred_keypoints"].clone()
    bare = Instances(instances.image_size, **fields)
    detections = coco_evaluation.instances_to_coco_json(bare, image_id)
    if masks is None:
        return detections
    with_masks = []
    for detection, rle in zip(detections, encoded_masks(masks), strict=True):
        # json knows no bytes. Keypoints come last, as in detectron2's files.
        segmentation = {"size": list(rle["size"]), "counts": rle["counts"].decode("ascii")}
        keypoints = {k: detection.pop(k) for k in ("keypoints",) if k in detection}
        with_masks.append({**detection, "segmentation": segmentation, **keypoints})
    return with_masks


def with_dataset_ids(
    detections: Iterable[dict[str, Any]], to_contiguous: Mapping[int, int] | None, dataset_name: str
) -> list[dict[str, Any]]:
    """The detections, with the data set's category ids in the place of the model's classes.

    Args:
        detections: not changed.
        to_contiguous: from category ids to classes; None where they are the same.
        dataset_name: for the message.

    Raises:
        UserError: the model has a class that the data set lacks.
    """
    if not to_contiguous:
        return [dict(detection) for detection in detections]
    to_dataset = {v: k for k, v in to_contiguous.items()}
    converted = []
    for detection in detections:
        category = detection["category_id"]
        if category not in to_dataset:
            raise UserError(
                f"the model predicted class {category}, {dataset_name} has "
                f"{len(to_dataset)} classes: were the weights trained on other classes?"
            )
        converted.append({**detection, "category_id": to_dataset[category]})
    return converted
