"""SOLVER.REFERENCE_IMS_PER_BATCH: a schedule for one batch size, with another."""

import logging
from itertools import pairwise

from detectron2.config import CfgNode

from mask_rcnn_plus.errors import UserError

logger = logging.getLogger(__name__)

_LENGTHS = (
    "SOLVER.MAX_ITER",
    "SOLVER.WARMUP_ITERS",
    "SOLVER.CHECKPOINT_PERIOD",
    "TEST.EVAL_PERIOD",
    "TEST.LOSS_PERIOD",
)


def scale_to_batch(cfg: CfgNode) -> None:
    """Scales the learning rate with the batch size, and lengths in iterations inversely, in place.

    Linear scaling (arXiv:1706.02677): as many images are seen, at a rate in proportion. Afterwards
    the reference is the batch size, so that the config saved with the run is not scaled again.

    Args:
        cfg: its SOLVER.REFERENCE_IMS_PER_BATCH is 0 for no scaling.

    Raises:
        UserError: detectron2's SOLVER.REFERENCE_WORLD_SIZE would scale as well, or so few
            iterations remain that SOLVER.STEPS would fall together.
    """
    solver = cfg.SOLVER
    reference, batch = solver.REFERENCE_IMS_PER_BATCH, solver.IMS_PER_BATCH
    if not reference:
        return
    if solver.REFERENCE_WORLD_SIZE:
        raise UserError(
            f"SOLVER.REFERENCE_WORLD_SIZE is {solver.REFERENCE_WORLD_SIZE} and "
            f"REFERENCE_IMS_PER_BATCH {reference}: both scale the learning rate; set one of them 0"
        )
    if reference == batch:
        return
    scale = batch / reference
    changes = []

    def change(key: str, value: float | int | tuple[int, ...]) -> None:
        group, name = key.split(".")
        changes.append(f"{key} {cfg[group][name]} -> {value}")
        cfg[group][name] = value

    most = solver.MAX_ITER
    change("SOLVER.BASE_LR", solver.BASE_LR * scale)
    if "BASE_LR_END" in solver:  # detectron2's main branch
        change("SOLVER.BASE_LR_END", solver.BASE_LR_END * scale)
    for key in _LENGTHS:
        group, name = key.split(".")
        if before := cfg[group][name]:
            change(key, max(1, round(before / scale)))
    # Those beyond the end detectron2 passes over.
    steps = tuple(round(step / scale) for step in solver.STEPS if step < most)
    if any(a >= b for a, b in pairwise((0, *steps, solver.MAX_ITER))):
        raise UserError(
            f"SOLVER.IMS_PER_BATCH is {batch}, {scale:g} times REFERENCE_IMS_PER_BATCH: of "
            f"MAX_ITER {most} and STEPS {tuple(solver.STEPS)} would remain {solver.MAX_ITER} and "
            f"{steps}, which do not rise from 1 on: set a smaller batch, or other STEPS"
        )
    change("SOLVER.STEPS", steps)
    solver.REFERENCE_IMS_PER_BATCH = batch
    logger.info(
        f"SOLVER.IMS_PER_BATCH is {batch}, {scale:g} times the reference {reference}: "
        f"{', '.join(changes)}"
    )
