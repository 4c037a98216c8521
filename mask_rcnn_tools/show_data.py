"""Draws training images as the model gets them: resized, augmented, with their objects."""

import argparse
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

from mask_rcnn_plus.config import load_config
from mask_rcnn_plus.data import build_train_batches, build_train_mapper, require_dataset
from mask_rcnn_plus.engine.setup import prepare_datasets
from mask_rcnn_plus.errors import UserError
from mask_rcnn_plus.evaluation.drawing import (
    DrawnObjects,
    Image,
    draw_objects,
    plain_text,
    text_size,
    write_text,
)
from mask_rcnn_tools.arguments import Parser, positive, require_new

PROGRAM = "mask-rcnn-plus show-data"

_EPILOG = f"""
example:
  {PROGRAM} --config-file configs/small_data.yaml --output data.png --images 12 \\
      DATASETS.TRAIN "('balloons_train',)" INPUT.JITTER.ENABLED True

The images are the first that train_net.py would train on with this config; another SEED shows
others. Each has its size in pixels and the number of its objects.
"""
_PAPER, _INK = (255, 255, 255), (40, 40, 40)
_GAP = 12
# With more objects than this in an image, boxes and labels would hide it.
_MANY = 30


def main(argv: Sequence[str]) -> int:
    """Draws and writes the picture.

    Args:
        argv: the arguments; see ``--help``.

    Returns:
        the exit code, 0.

    Raises:
        UserError: an argument does not fit, the data cannot be used, or nothing can be written.
    """
    arguments = _parse(argv)
    output: Path = arguments.output
    if output.suffix.lower() not in (".png", ".jpg", ".jpeg"):
        raise UserError(f"--output {output}: name a .png or .jpg file")
    require_new(output, overwrite=arguments.overwrite)
    cfg = load_config(arguments.config_file, arguments.opts)
    if not cfg.DATASETS.TRAIN:
        raise UserError("DATASETS.TRAIN is empty: name a data set, e.g. \"('mine_train',)\"")
    prepare_datasets(cfg)
    for name in cfg.DATASETS.TRAIN:
        require_dataset(name, training=True)
    names = MetadataCatalog.get(cfg.DATASETS.TRAIN[0]).get("thing_classes") or ()
    cells = [
        draw_sample(sample, names, image_format=cfg.INPUT.FORMAT, side=arguments.side)
        for sample in first_samples(cfg, arguments.images)
    ]
    try:
        output.write_bytes(cv2.imencode(output.suffix, tiled(cells))[1].tobytes())
    except OSError as error:
        raise UserError(f"cannot write {output}: {error.strerror or error}") from error
    print(f"written: {output}", file=sys.stderr)
    return 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(prog=PROGRAM, description=__doc__, epilog=_EPILOG)
    parser.add_argument("--config-file", required=True, metavar="YAML")
    parser.add_argument("--output", required=True, type=Path, metavar="PICTURE")
    parser.add_argument("--images", type=positive, default=9, help="how many (default: 9)")
    parser.add_argument("--side", type=positive, default=400, help="pixels of each one's longer")
    parser.add_argument("--overwrite", action="store_true", help="replace PICTURE")
    parser.add_overrides()
    return parser.parse_args(argv)


def first_samples(cfg: CfgNode, count: int) -> list[dict[str, Any]]:
    """The first samples of a training by this config, loaded in this process.

    Args:
        cfg: from ``load_config``; its data sets are registered. Where SEED is -1, 0 is taken.
        count: how many.

    Raises:
        UserError: an image or annotation cannot be used.
    """
    alone = cfg.clone()
    alone.DATALOADER.NUM_WORKERS = 0
    batches = build_train_batches(alone, build_train_mapper(alone), seed=max(0, cfg.SEED))
    samples = islice(chain.from_iterable(batches), count)
    return list(tqdm(samples, total=count, unit="image", disable=not sys.stderr.isatty()))


def draw_sample(
    sample: dict[str, Any], class_names: Sequence[str], *, image_format: str, side: int
) -> Image:
    """A training sample with its objects, and its name, size and number of objects above it.

    Args:
        sample: "image" (C, H, W) and "instances", as a mapper makes them.
        class_names: names of the classes 0, 1, ...
        image_format: INPUT.FORMAT.
        side: pixels of the drawing's longer side.

    Returns:
        (height, width, 3), BGR.
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
    drawn = draw_objects(image, objects, class_names, size, crowded=len(objects) > _MANY)
    for x, y, _ in _points(sample["instances"]):
        cv2.circle(drawn, (round(scale * x), round(scale * y)), 2, _PAPER, cv2.FILLED, cv2.LINE_AA)
    name = plain_text(Path(sample.get("file_name", "")).name, otherwise="image")
    caption = f"{name[-24:]}  {width} x {height}, {len(objects)} objects"
    cell = np.full((text_size(caption)[1] + size[0], max(side, text_size(caption)[0]), 3), _PAPER)
    cell = cell.astype(np.uint8)
    write_text(cell, caption, (-3, 0), _INK)
    cell[-size[0] :, : size[1]] = drawn
    return cell


def tiled(cells: Sequence[Image]) -> Image:
    """Pictures in rows on white, as many columns as rows or one more."""
    columns = math.ceil(math.sqrt(len(cells)))
    rows = math.ceil(len(cells) / columns)
    height, width = (max(cell.shape[axis] for cell in cells) + _GAP for axis in (0, 1))
    page = np.full((rows * height + _GAP, columns * width + _GAP, 3), _PAPER, np.uint8)
    for place, cell in enumerate(cells):
        top, left = (_GAP + at for at in (place // columns * height, place % columns * width))
        page[top : top + cell.shape[0], left : left + cell.shape[1]] = cell
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
    """(x, y, visibility) of the labelled keypoints."""
    if not instances.has("gt_keypoints"):
        return []
    points = instances.gt_keypoints.tensor.flatten(0, 1)
    return points[points[:, 2] > 0].tolist()
