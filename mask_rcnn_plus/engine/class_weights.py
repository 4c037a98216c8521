"""MODEL.ROI_BOX_HEAD.CLASS_WEIGHTING: weights of classes from the training sets."""

import logging
from collections import Counter

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog

from mask_rcnn_plus.errors import UserError

logger = logging.getLogger(__name__)


def settle_class_weights(cfg: CfgNode, names: list[str]) -> None:
    """Turns CLASS_WEIGHTING "inverse_frequency" into numbers in CLASS_WEIGHTS, in place.

    A class c with n_c of N objects gets N / (K n_c): over the objects the weights have mean 1.
    CLASS_WEIGHTING then says "none", so that the config saved with the run has the numbers alone.

    Args:
        cfg: the config.
        names: of the classes, in the order of class ids.

    Raises:
        UserError: the weights are given already, or a class has no object.
    """
    head = cfg.MODEL.ROI_BOX_HEAD
    if head.CLASS_WEIGHTING == "none":
        return
    if head.CLASS_WEIGHTS:
        raise UserError(
            f"MODEL.ROI_BOX_HEAD.CLASS_WEIGHTING is '{head.CLASS_WEIGHTING}', and CLASS_WEIGHTS "
            "are given: set one of them"
        )
    counts: Counter[int] = Counter()
    for name in cfg.DATASETS.TRAIN:
        for record in DatasetCatalog.get(name):
            objects = record.get("annotations", ())
            counts.update(o["category_id"] for o in objects if not o.get("iscrowd", 0))
    empty = [name for index, name in enumerate(names) if not counts[index]]
    if empty:
        raise UserError(
            f"MODEL.ROI_BOX_HEAD.CLASS_WEIGHTING inverse_frequency: class '{empty[0]}' has no "
            "object in DATASETS.TRAIN: set CLASS_WEIGHTS yourself"
        )
    total = sum(counts[index] for index in range(len(names)))
    weights = [total / (len(names) * counts[index]) for index in range(len(names))]
    head.CLASS_WEIGHTS = [float(f"{weight:.4g}") for weight in weights]
    head.CLASS_WEIGHTING = "none"
    said = (f"{n} {w:g}" for n, w in zip(names, head.CLASS_WEIGHTS, strict=True))
    logger.info(f"MODEL.ROI_BOX_HEAD.CLASS_WEIGHTS by inverse frequency: {', '.join(said)}")
