"""What the model benchmark runs on: pictures of its own, or those of a data set."""

import copy
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetMapper

from benchmarks.model_case import make_image, make_records
from benchmarks.model_sides import Inputs, Side
from benchmarks.model_training import time_mapping
from mask_rcnn_plus.data import NamingMapper, PolygonMapper, require_dataset
from mask_rcnn_plus.data.build import build_test_batches
from mask_rcnn_plus.data.seeding import seed_all
from mask_rcnn_plus.errors import UserError
from mask_rcnn_plus.evaluation import build_coco_evaluator, run_inference

# Photographs are larger than what a network is trained on.
_PHOTO = 1.25
_TIMED_IMAGES = 4


def inference_images(cfg: CfgNode, name: str | None, count: int, size: tuple[int, int]) -> Inputs:
    """Images as a test loader gives them.

    Args:
        cfg: its INPUT says how a data set's images are resized.
        name: of the data set; None for pictures of ``size``.
        count: of images; a data set's are taken again where it has fewer.
        size: (height, width).
    """
    if name is None:
        height, width = size
        return [
            {"image": make_image(*size, seed), "height": height, "width": width}
            for seed in range(count)
        ]
    mapper = NamingMapper(DatasetMapper(_without_keypoints(cfg), is_train=False))
    records = require_dataset(name)
    return [mapper(copy.deepcopy(records[i % len(records)])) for i in range(count)]


def training_batches(
    cfg: CfgNode, name: str | None, *, batch: int, batches: int, size: tuple[int, int]
) -> tuple[list[Inputs], tuple[float, float]]:
    """Mapped samples with ground truth, and what loading takes.

    Args:
        cfg: detectron2's; its INPUT is set, in place, to the size where the pictures are our own.
        name: of the data set; None for JPEG pictures of our own.
        batch, batches: how many samples, and how many lists of them.
        size: (height, width) of the network's input.

    Returns:
        the batches; the milliseconds that loading one takes a process of detectron2's, and ours.

    Raises:
        UserError: the data set has too few images with objects.
    """
    with tempfile.TemporaryDirectory() as folder:
        if name is None:
            cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN = [min(size)], max(size)
            height, width = (round(_PHOTO * side) for side in size)
            records = make_records(
                Path(folder),
                batch * batches,
                height=height,
                width=width,
                classes=cfg.MODEL.ROI_HEADS.NUM_CLASSES,
            )
        else:
            records = [r for r in require_dataset(name, training=True) if r.get("annotations")]
            # Whose keypoints change places in a mirrored image.
            cfg = cfg.clone()
            cfg.DATASETS.TRAIN = [name]
        polygons = cfg.MODEL.MASK_ON and cfg.INPUT.MASK_FORMAT == "polygon"
        stock: Any = DatasetMapper(cfg, is_train=True)
        # detectron2's takes no run lengths for polygons.
        stock = PolygonMapper(stock) if polygons and name is not None else stock
        mapper = DatasetMapper(cfg, is_train=True)
        ours = NamingMapper(PolygonMapper(mapper) if polygons else mapper)
        lists = []
        for number in range(batches):
            chosen = [records[(number * batch + i) % len(records)] for i in range(batch)]
            seed_all(0, "benchmark", number)
            lists.append([ours(copy.deepcopy(record)) for record in chosen])
        if not all(len(sample["instances"]) for one in lists for sample in one):
            raise UserError(f"data set '{name}' has images without objects among its first")
        times = time_mapping((stock, ours), records[:_TIMED_IMAGES], repeats=3)
    return lists, (batch * times[0], batch * times[1])


def average_precision(
    cfg: CfgNode, sides: Sequence[Side], name: str
) -> dict[str, dict[str, float]]:
    """AP of boxes and masks, by side, over a whole data set; torchvision's is not evaluated.

    Masks of all sides are encoded by ours, whose bytes are detectron2's.
    """
    results = {}
    for side in sides:
        if side.name.startswith("torchvision"):
            continue
        evaluator = build_coco_evaluator(
            name,
            output_dir=None,
            detections_per_image=cfg.TEST.DETECTIONS_PER_IMAGE,
            kpt_oks_sigmas=tuple(cfg.TEST.KEYPOINT_OKS_SIGMAS),
        )
        found, _ = run_inference(
            side.model, build_test_batches(cfg, name), evaluator, dataset_name=name
        )
        results[side.name] = {task: figures["AP"] for task, figures in found.items()}
    return results


def _without_keypoints(cfg: CfgNode) -> CfgNode:
    plain = cfg.clone()
    plain.defrost()
    plain.MODEL.KEYPOINT_ON = False
    return plain
