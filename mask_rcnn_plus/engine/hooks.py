"""The hooks of a training run."""

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

from mask_rcnn_plus.config import with_values
from mask_rcnn_plus.engine import ema
from mask_rcnn_plus.engine.checkpoint import Checkpointer
from mask_rcnn_plus.engine.console import ProgressBar
from mask_rcnn_plus.engine.curves import write_curves
from mask_rcnn_plus.engine.loggers import Loggers
from mask_rcnn_plus.engine.memory import FreedMemory
from mask_rcnn_plus.engine.metrics import (
    BestCheckpoint,
    EarlyStopping,
    Evaluation,
    Metric,
    MetricsHistory,
    Watcher,
)
from mask_rcnn_plus.engine.stops import StopSignals
from mask_rcnn_plus.engine.validation import build_validation


def extend_hooks(
    hooks: Sequence[HookBase | None],
    cfg: CfgNode,
    *,
    checkpointer: Checkpointer,
    signals: StopSignals,
) -> list[HookBase | None]:
    """Adds this project's hooks to those of detectron2's DefaultTrainer, in the right order."""
    extended: list[HookBase | None] = [MetricsHistory(Path(cfg.OUTPUT_DIR) / "metrics.json")]
    extended.append(FreedMemory())
    average = None
    if cfg.SOLVER.EMA.ENABLED:
        average = ema.WeightAverage(
            decay=cfg.SOLVER.EMA.DECAY, warmup=cfg.SOLVER.EMA.WARMUP, checkpointer=checkpointer
        )
    for hook in hooks:
        # The average includes a step before it is saved. Only the main process has the hook that
        # saves; the others have the average before the evaluation.
        if isinstance(hook, PeriodicCheckpointer | EvalHook) and average not in extended:
            extended.append(average)
        if isinstance(hook, EvalHook):
            hook = Evaluation(
                partial(_evaluate_all, hook._func, cfg, average),
                period=cfg.TEST.EVAL_PERIOD,
                validation=build_validation(cfg) if cfg.TEST.LOSS_PERIOD else None,
                loss_period=cfg.TEST.LOSS_PERIOD,
                watchers=_build_watchers(cfg, checkpointer, average),
                checkpointer=checkpointer,
                signals=signals,
            )
        elif isinstance(hook, PreciseBN):
            extended.append(CallbackHook(before_step=partial(_rewind, hook)))
        extended.append(hook)
    if comm.is_main_process():
        extended.insert(-1, ProgressBar())
        # After detectron2's writers.
        extended.append(CallbackHook(after_train=_draw_curves))
        if cfg.SOLVER.LOGGERS:
            extended.append(Loggers(cfg))
    return extended


def _build_watchers(
    cfg: CfgNode, checkpointer: Checkpointer, average: ema.WeightAverage | None
) -> list[Watcher]:
    watchers: list[Watcher] = []
    if name := cfg.TEST.BEST_METRIC:
        save = partial(_save_best, checkpointer)
        if average is not None and name.startswith(f"{ema.NAME}/"):
            save = partial(average.save, "best")
        watchers.append(BestCheckpoint(Metric(name, cfg.TEST.BEST_MODE), save))
    if (stopping := cfg.TEST.EARLY_STOPPING).METRIC:
        metric = Metric(stopping.METRIC, stopping.MODE)
        options = {"patience": stopping.PATIENCE, "min_delta": stopping.MIN_DELTA}
        watchers.append(EarlyStopping(metric, **options))
    return watchers


def _save_best(checkpointer: Checkpointer, iteration: int) -> str:
    checkpointer.save("model_best", tag=False, iteration=iteration)
    return "model_best.pth"


def _evaluate_all(
    evaluate: Callable[[], dict[str, Any]], cfg: CfgNode, average: ema.WeightAverage | None
) -> dict[str, Any]:
    """Evaluates the weights, and with SOLVER.EMA also the averaged weights."""
    results = {**evaluate()}
    _show_pictures(cfg, "")
    if average is not None:
        folder = str(Path(cfg.OUTPUT_DIR) / ema.NAME)
        averaged_cfg = with_values(cfg, {"OUTPUT_DIR": folder})
        with average.applied():
            results[ema.NAME] = average.trainer.test(averaged_cfg, average.trainer.model)
        _show_pictures(averaged_cfg, f"{ema.NAME}/")
    return results


def _show_pictures(cfg: CfgNode, prefix: str) -> None:
    """Sends the previews of an evaluation to TensorBoard."""
    if not (cfg.TEST.PREVIEW_TENSORBOARD and comm.is_main_process()):
        return
    for name in cfg.DATASETS.TEST:
        picture = cv2.imread(str(Path(cfg.OUTPUT_DIR) / f"preview_{name}.png"))
        if picture is not None:  # otherwise drawing failed, which is in the log
            image = picture[:, :, ::-1].transpose(2, 0, 1).copy()
            get_event_storage().put_image(f"{prefix}preview/{name}", image)


def _draw_curves(trainer: Any) -> None:
    if trainer.finished:
        write_curves(Path(trainer.cfg.OUTPUT_DIR))


def _rewind(precise: PreciseBN, trainer: Any) -> None:
    """Makes PreciseBN use the same images each time, also in a resumed run."""
    precise._data_loader.start(step=0)
    precise._data_iter = None
