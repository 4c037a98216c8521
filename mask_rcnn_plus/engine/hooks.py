"""detectron2's training hooks, with this project's."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.engine.hooks import CallbackHook, EvalHook, PreciseBN
from detectron2.utils import comm

from mask_rcnn_plus.engine.checkpoint import Checkpointer
from mask_rcnn_plus.engine.console import ProgressBar
from mask_rcnn_plus.engine.evaluating import Evaluation
from mask_rcnn_plus.engine.history import MetricsHistory
from mask_rcnn_plus.engine.stops import Stops


def extended(
    hooks: Sequence[HookBase | None], cfg: CfgNode, *, checkpointer: Checkpointer, stops: Stops
) -> list[HookBase | None]:
    """The hooks of a run.

    Args:
        hooks: those of detectron2's DefaultTrainer.
        cfg: the config.
        checkpointer: of the run.
        stops: of the run.
    """
    ours: list[HookBase | None] = [MetricsHistory(Path(cfg.OUTPUT_DIR) / "metrics.json")]
    for hook in hooks:
        if isinstance(hook, EvalHook):
            hook = Evaluation(
                hook,
                period=cfg.TEST.EVAL_PERIOD,
                stops=stops,
                metric=cfg.TEST.BEST_METRIC,
                checkpointer=checkpointer,
            )
        elif isinstance(hook, PreciseBN):
            ours.append(CallbackHook(before_step=partial(_rewind, hook)))
        ours.append(hook)
    if comm.is_main_process():
        ours.insert(-1, ProgressBar())
    return ours


def _rewind(precise: PreciseBN, trainer: Any) -> None:
    """Lets it see the same images each time, which it would see in a resumed run."""
    precise._data_loader.start(step=0)
    precise._data_iter = None
