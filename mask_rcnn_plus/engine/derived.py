"""Computes settings: the schedule from the batch size, class weights from the data."""

import logging
from collections import Counter
from itertools import pairwise

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog

from mask_rcnn_plus.config.values import is_auto
from mask_rcnn_plus.errors import UserError

logger = logging.getLogger(__name__)

# Settings that count iterations.
_LENGTHS = {
    "SOLVER": ("MAX_ITER", "WARMUP_ITERS", "CHECKPOINT_PERIOD"),
    "TEST": ("EVAL_PERIOD", "LOSS_PERIOD"),
}


def scale_schedule(cfg: CfgNode) -> None:
    """Scales the learning rate with the batch size, and numbers of iterations inversely, in place.

    Linear scaling (arXiv:1706.02677): training sees the same number of images. Afterwards
    SOLVER.REFERENCE_IMS_PER_BATCH is the batch size, so that the saved config is not scaled again.
    If it is 0, nothing is scaled.

    Raises:
        UserError: detectron2's SOLVER.REFERENCE_WORLD_SIZE would scale too, or the scaled
            SOLVER.STEPS no longer increase.
    """
    solver = cfg.SOLVER
    reference, batch = solver.REFERENCE_IMS_PER_BATCH, solver.IMS_PER_BATCH
    if not reference:
        return
    if solver.REFERENCE_WORLD_SIZE:
        raise UserError(
            f"SOLVER.REFERENCE_WORLD_SIZE is {solver.REFERENCE_WORLD_SIZE} and "
            f"REFERENCE_IMS_PER_BATCH is {reference}: both scale the learning rate; set one to 0"
        )
    if reference == batch:
        return
    scale = batch / reference
    changes = []

    def change(group: str, name: str, value: float | int | tuple[int, ...]) -> None:
        changes.append(f"{group}.{name} {cfg[group][name]} -> {value}")
        cfg[group][name] = value

    max_iter = solver.MAX_ITER
    change("SOLVER", "BASE_LR", solver.BASE_LR * scale)
    if "BASE_LR_END" in solver:  # detectron2's main branch
        change("SOLVER", "BASE_LR_END", solver.BASE_LR_END * scale)
    for group, names in _LENGTHS.items():
        for name in names:
            if (before := cfg[group][name]) > 0:  # -1 follows from the data and the batch size
                change(group, name, max(1, round(before / scale)))
    auto = max_iter == -1 or is_auto(solver.STEPS)
    # detectron2 ignores steps after the end.
    steps = tuple(round(step / scale) for step in solver.STEPS if step < max_iter)
    if not auto and any(a >= b for a, b in pairwise((0, *steps, solver.MAX_ITER))):
        raise UserError(
            f"SOLVER.IMS_PER_BATCH is {batch}, {scale:g} times REFERENCE_IMS_PER_BATCH: "
            f"MAX_ITER {max_iter} and STEPS {tuple(solver.STEPS)} become {solver.MAX_ITER} and "
            f"{steps}, which do not increase from 1 on: set a smaller batch, or other STEPS"
        )
    if not auto:
        change("SOLVER", "STEPS", steps)
    solver.REFERENCE_IMS_PER_BATCH = batch
    logger.info(
        f"SOLVER.IMS_PER_BATCH is {batch}, {scale:g} times the reference {reference}: "
        f"{', '.join(changes)}"
    )


def resolve_class_weights(cfg: CfgNode, names: list[str]) -> None:
    """Replaces CLASS_WEIGHTING "inverse_frequency" by numbers in CLASS_WEIGHTS, in place.

    With n_c of N objects, class c of K gets N / (K n_c): the mean weight over all objects is 1.
    Afterwards CLASS_WEIGHTING is "none", so that the saved config only has the numbers.

    Args:
        cfg: a config whose training sets are registered.
        names: class names, in the order of class ids.

    Raises:
        UserError: CLASS_WEIGHTS is set as well, or a class does not have any object.
    """
    head = cfg.MODEL.ROI_BOX_HEAD
    if head.CLASS_WEIGHTING == "none":
        return
    if head.CLASS_WEIGHTS:
        raise UserError(
            f"MODEL.ROI_BOX_HEAD.CLASS_WEIGHTING is '{head.CLASS_WEIGHTING}', but CLASS_WEIGHTS "
            "is set as well: set only one of them"
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
    listed = (f"{name} {w:g}" for name, w in zip(names, head.CLASS_WEIGHTS, strict=True))
    logger.info(f"MODEL.ROI_BOX_HEAD.CLASS_WEIGHTS by inverse frequency: {', '.join(listed)}")
