"""Fits the anchors of a config to the boxes of data sets."""

import sys
from collections.abc import Sequence
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import detection_utils
from tqdm import tqdm

from mask_rcnn_plus.data.anchors import (
    Anchors,
    SeenBoxes,
    config_anchors,
    coverage,
    fit,
    seen_boxes,
)
from mask_rcnn_plus.data.augmentation import build_augmentations
from mask_rcnn_plus.errors import UserError
from mask_rcnn_tools.config_run import training_records

# More boxes hardly improve the estimate of the recall.
_MAX_BOXES = 10_000
_MAX_DRAWS = 20  # of each image


def fit_to_datasets(cfg: CfgNode, names: Sequence[str]) -> tuple[str, str]:
    """Fits the anchors of a config to data sets, by default DATASETS.TRAIN.

    Returns:
        a table of the recall before and after; and the lines for the config.

    Raises:
        UserError: the config's anchors cannot be fitted, or a data set cannot be used.
    """
    now = config_anchors(cfg)  # before [[-1]] is replaced by fitted sizes
    records = training_records(cfg, names)
    title = ", ".join(names or cfg.DATASETS.TRAIN)
    training = _boxes(cfg, records, train=True)
    if not len(training):
        raise UserError(f"data set {title} has no boxes to fit anchors to")
    with tqdm(desc="fitting", unit="trial", disable=not sys.stderr.isatty()) as bar:
        fitted = fit(training, now, tick=bar.update)
    table = _table(title, training, _boxes(cfg, records, train=False), now, fitted)
    if fitted == now:
        table += "\n\nFound nothing better: keep the anchors of the config."
    return table, _yaml(fitted)


def _boxes(cfg: CfgNode, records: list[dict[str, Any]], *, train: bool) -> SeenBoxes:
    augmentations = detection_utils.build_augmentation(cfg, is_train=False)
    draws = 1
    if train:
        augmentations = build_augmentations(cfg)
        count = sum(len(record.get("annotations", ())) for record in records)
        draws = max(1, min(_MAX_DRAWS, _MAX_BOXES // max(1, count)))
    seed = max(0, cfg.SEED)
    bar = tqdm(records, unit="image", disable=not sys.stderr.isatty())
    return seen_boxes(bar, augmentations, seed=seed, draws=draws).some(_MAX_BOXES, seed=seed)


def _table(names: str, training: SeenBoxes, test: SeenBoxes, now: Anchors, fitted: Anchors) -> str:
    lines = [
        f"{names}: {len(training)} boxes at training size, {len(test)} at test size",
        f"{'':26}{'IoU >= 0.5':>12}{'IoU >= 0.7':>12}{'mean IoU':>12}",
    ]
    for size, boxes in (("training", training), ("test", test)):
        for name, anchors in (("now", now), ("fitted", fitted)):
            result = coverage(boxes, anchors)
            values = f"{result.recall_50:12.1%}{result.recall_70:12.1%}{result.mean:12.3f}"
            lines.append(f"{f'at {size} size, {name}':26}{values}")
    return "\n".join(lines)


def _yaml(anchors: Anchors) -> str:
    sizes, ratios = (
        ", ".join(f"[{', '.join(f'{value:g}' for value in level)}]" for level in levels)
        for levels in (anchors.sizes, anchors.ratios)
    )
    if len(set(anchors.ratios)) == 1:
        ratios = ratios[: ratios.index("]") + 1]
    return f"MODEL:\n  ANCHOR_GENERATOR:\n    SIZES: [{sizes}]\n    ASPECT_RATIOS: [{ratios}]\n"
