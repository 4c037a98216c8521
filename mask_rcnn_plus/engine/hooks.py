"""detectron2's training hooks, with this project's."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import cv2
from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.engine.hooks import CallbackHook, EvalHook, PeriodicCheckpointer, PreciseBN
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage

from mask_rcnn_plus.engine import ema
from mask_rcnn_plus.engine.checkpoint import Checkpointer
from mask_rcnn_plus.engine.console import ProgressBar
from mask_rcnn_plus.engine.evaluating import Evaluation
from mask_rcnn_plus.engine.figures import Best, EarlyStopping, Figure
from mask_rcnn_plus.engine.history import MetricsHistory
from mask_rcnn_plus.engine.stops import Stops
from mask_rcnn_plus.engine.validation import build_validation


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
    average, placed = None, False
    if cfg.SOLVER.EMA.ENABLED:
        average = ema.WeightAverage(
            decay=cfg.SOLVER.EMA.DECAY, warmup=cfg.SOLVER.EMA.WARMUP, checkpointer=checkpointer
        )
    for hook in hooks:
        # The average takes in the step before anything is saved; its place is the same in
        # processes that save nothing.
        if isinstance(hook, PeriodicCheckpointer | EvalHook) and not placed:
            ours.append(average)
            placed = True
        if isinstance(hook, EvalHook):
            hook._func = partial(_evaluate_all, hook._func, cfg, average)
            hook = Evaluation(
                hook,
                period=cfg.TEST.EVAL_PERIOD,
                validation=build_validation(cfg) if cfg.TEST.LOSS_PERIOD else None,
                loss_period=cfg.TEST.LOSS_PERIOD,
                watchers=_watchers(cfg, checkpointer, average),
                checkpointer=checkpointer,
                stops=stops,
            )
        elif isinstance(hook, PreciseBN):
            ours.append(CallbackHook(before_step=partial(_rewind, hook)))
        ours.append(hook)
    if comm.is_main_process():
        ours.insert(-1, ProgressBar())
    return ours


def _watchers(
    cfg: CfgNode, checkpointer: Checkpointer, average: ema.WeightAverage | None
) -> list[Best | EarlyStopping]:
    watchers: list[Best | EarlyStopping] = []
    test = cfg.TEST
    if test.BEST_METRIC:
        # The weights to keep are those that the figure is of.
        averaged = average is not None and test.BEST_METRIC.startswith(f"{ema.NAME}/")
        save = partial(_save_best, checkpointer, average if averaged else None)
        watchers.append(Best(Figure(test.BEST_METRIC, test.BEST_MODE), save))
    if (stopping := test.EARLY_STOPPING).METRIC:
        watchers.append(
            EarlyStopping(
                Figure(stopping.METRIC, stopping.MODE),
                patience=stopping.PATIENCE,
                min_delta=stopping.MIN_DELTA,
            )
        )
    return watchers


def _save_best(
    checkpointer: Checkpointer, average: ema.WeightAverage | None, iteration: int
) -> str:
    if average is not None:
        return average.save("best", iteration)
    checkpointer.save("model_best", tag=False, iteration=iteration)
    return "model_best.pth"


def _evaluate_all(
    evaluate: Callable[[], dict[str, Any]], cfg: CfgNode, average: ema.WeightAverage | None
) -> dict[str, Any]:
    """Evaluates the weights, and their averages where there are any; shows the pictures."""
    results = {**evaluate()}
    _show_pictures(cfg, "")
    if average is not None:
        folder = cfg.clone()
        folder.defrost()
        folder.OUTPUT_DIR = str(Path(cfg.OUTPUT_DIR) / ema.NAME)
        folder.freeze()
        trainer = average.trainer
        with average.applied():
            results[ema.NAME] = trainer.test(folder, trainer.model)
        _show_pictures(folder, f"{ema.NAME}/")
    return results


def _show_pictures(cfg: CfgNode, prefix: str) -> None:
    """Hands the pictures that an evaluation has drawn to TensorBoard."""
    if not (cfg.TEST.PREVIEW_TENSORBOARD and comm.is_main_process()):
        return
    for name in cfg.DATASETS.TEST:
        picture = cv2.imread(str(Path(cfg.OUTPUT_DIR) / f"preview_{name}.png"))
        if picture is not None:  # it could not be drawn, which was said
            image = picture[:, :, ::-1].transpose(2, 0, 1).copy()
            get_event_storage().put_image(f"{prefix}preview/{name}", image)


def _rewind(precise: PreciseBN, trainer: Any) -> None:
    """Lets it see the same images each time, which it would see in a resumed run."""
    precise._data_loader.start(step=0)
    precise._data_iter = None
