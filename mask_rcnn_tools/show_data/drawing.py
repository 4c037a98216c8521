"""Loads and draws the samples that a config trains on."""

import math
import sys
from collections.abc import Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pycocotools.mask as mask_util
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.structures import BitMasks, Instances
from tqdm import tqdm

from mask_rcnn_plus.data import build_train_batches, build_train_mapper
from mask_rcnn_plus.evaluation.drawing import DrawnObjects, Image, draw_objects
from mask_rcnn_plus.evaluation.text import drawable, shortened, text_size, write_text
from mask_rcnn_tools.config_run import training_records

_WHITE, _DARK = (255, 255, 255), (40, 40, 40)
_GAP = 12  # pixels between images
_NAME_WIDTH = 160  # pixels that a file name always gets
# With more objects than this, boxes and labels would hide the image.
_CROWDED = 30


def draw_samples(cfg: CfgNode, *, count: int, side: int) -> Image:
    """Draws the first samples that a config trains on.

    Args:
        cfg: from ``load_config``.
        count: number of samples.
        side: longer side of each sample's drawing in pixels.

    Returns:
        (height, width, 3), uint8, BGR.

    Raises:
        UserError: a data set cannot be used.
    """
    training_records(cfg)
    names = MetadataCatalog.get(cfg.DATASETS.TRAIN[0]).get("thing_classes") or ()
    return tile(
        [
            draw_sample(sample, names, image_format=cfg.INPUT.FORMAT, side=side)
            for sample in first_samples(cfg, count)
        ]
    )


def first_samples(cfg: CfgNode, count: int) -> list[dict[str, Any]]:
    """Loads the first samples that a config trains on; its data sets are registered.

    A SEED of -1 counts as 0.

    Raises:
        UserError: an image or annotation cannot be used.
    """
    cfg = cfg.clone()
    cfg.DATALOADER.NUM_WORKERS = 0
    batches = build_train_batches(cfg, build_train_mapper(cfg), seed=max(0, cfg.SEED))
    samples = islice(chain.from_iterable(batches), count)
    return list(tqdm(samples, total=count, unit="image", disable=not sys.stderr.isatty()))


def draw_sample(
    sample: dict[str, Any], class_names: Sequence[str], *, image_format: str, side: int
) -> Image:
    """Draws a training sample with its objects under a caption.

    Args:
        sample: "image" (C, H, W) and "instances", as a dataset mapper returns them.
        class_names: in the order of class ids.
        image_format: INPUT.FORMAT.
        side: longer side of the drawing in pixels.

    Returns:
        (height, width, 3), uint8, BGR.
    """
    image = np.ascontiguousarray(sample["image"].permute(1, 2, 0).numpy())
    if image.shape[2] == 1:
        image = np.repeat(image, 3, axis=2)
    elif image_format == "RGB":
        image = np.ascontiguousarray(image[..., ::-1])
    height, width = image.shape[:2]
    scale = side / max(height, width)
    size = max(1, round(scale * height)), max(1, round(scale * width))
    objects = _objects(sample["instances"])
    drawn = draw_objects(image, objects, class_names, size, crowded=len(objects) > _CROWDED)
    for x, y, _ in _points(sample["instances"]):
        cv2.circle(drawn, (round(scale * x), round(scale * y)), 2, _WHITE, cv2.FILLED, cv2.LINE_AA)
    name = drawable(Path(sample.get("file_name", "")).name, otherwise="image")
    facts = f"  {width} x {height}, {len(objects)} objects"
    caption = shortened(name, max(_NAME_WIDTH, side - text_size(facts)[0])) + facts
    text_width, text_height = text_size(caption)
    result = np.full((text_height + size[0], max(side, text_width), 3), _WHITE, np.uint8)
    write_text(result, caption, (-3, 0), _DARK)
    result[-size[0] :, : size[1]] = drawn
    return result


def tile(images: Sequence[Image]) -> Image:
    """Arranges images in rows on white, with as many columns as rows, or one more."""
    columns = math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    height, width = (max(image.shape[axis] for image in images) + _GAP for axis in (0, 1))
    page = np.full((rows * height + _GAP, columns * width + _GAP, 3), _WHITE, np.uint8)
    for i, image in enumerate(images):
        top, left = _GAP + i // columns * height, _GAP + i % columns * width
        page[top : top + image.shape[0], left : left + image.shape[1]] = image
    return page


def _objects(instances: Instances) -> DrawnObjects:
    masks = None
    if instances.has("gt_masks"):
        masks = instances.gt_masks
        if not isinstance(masks, BitMasks):
            masks = BitMasks.from_polygon_masks(masks, *instances.image_size)
        masks = [mask_util.encode(np.asfortranarray(mask, np.uint8)) for mask in masks.tensor]
    return DrawnObjects(
        boxes=instances.gt_boxes.tensor.double().numpy(),
        classes=instances.gt_classes.numpy(),
        masks=masks,
    )


def _points(instances: Instances) -> list[list[float]]:
    """(x, y, visibility) of each labelled keypoint."""
    if not instances.has("gt_keypoints"):
        return []
    points = instances.gt_keypoints.tensor.flatten(0, 1)
    return points[points[:, 2] > 0].tolist()
