"""Evaluation in the course of a run, and the checkpoint with the best figure."""

import logging
import math
from typing import Any

from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.engine.hooks import EvalHook
from detectron2.utils import comm
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mask_rcnn_plus.engine.checkpoint import Checkpointer
from mask_rcnn_plus.engine.stops import Stops
from mask_rcnn_plus.errors import did_you_mean
from mask_rcnn_plus.modeling import OptimizedModel, optimize

logger = logging.getLogger(__name__)


def for_evaluation(cfg: CfgNode, model: nn.Module) -> nn.Module:
    """What is evaluated: the model, or what TEST.OPTIMIZE makes of the weights that it has now.

    Args:
        cfg: the config.
        model: it stays as it is; may be wrapped for distributed training.

    Raises:
        UserError: TEST.OPTIMIZE.DTYPE is none for the model's device.
    """
    asked = cfg.TEST.OPTIMIZE
    if not asked.ENABLED or isinstance(model, OptimizedModel):
        return model
    if isinstance(model, DistributedDataParallel):
        model = model.module
    return optimize(model, asked.DTYPE, compile=asked.COMPILE, cuda_graphs=asked.CUDA_GRAPHS)


class Evaluation(HookBase):
    """Evaluates as an EvalHook does, lets a signal end it, and keeps the best checkpoint.

    detectron2's BestCheckpointer forgets the best figure when a run is resumed, and makes the best
    checkpoint the one to resume from.

    Args:
        hook: what evaluates, every ``period`` iterations and at the end.
        period: its period.
        stops: of the run.
        metric: the figure by which ``model_best.pth`` is chosen, the larger the better, as
            "segm/AP" (with several test sets "NAME/segm/AP"); "" to keep none.
        checkpointer: what saves it; in the main process alone anything is saved.
    """

    def __init__(
        self, hook: EvalHook, *, period: int, stops: Stops, metric: str, checkpointer: Checkpointer
    ) -> None:
        self._hook = hook
        self._period = period
        self._stops = stops
        self._metric = metric
        self._checkpointer = checkpointer
        self._best: dict[str, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        return self._best

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._best = state

    def before_train(self) -> None:
        self._hook.trainer = trainer = self.trainer
        # A checkpoint is saved before its evaluation, which the run may not have lived to see.
        if self._metric and trainer.start_iter and self._is_due(trainer.start_iter):
            logger.info("Evaluating the checkpoint that the run goes on from")
            trainer.storage.iter = trainer.start_iter - 1
            with self._stops.at_once():
                self._hook._do_eval()
            self._judge(trainer.start_iter - 1)

    def after_step(self) -> None:
        if self._is_due(self.trainer.iter + 1):
            with self._stops.at_once():
                self._hook.after_step()
            self._judge(self.trainer.iter)

    def after_train(self) -> None:
        if self.trainer.finished:
            with self._stops.at_once():
                self._hook.after_train()
            self._judge(self.trainer.max_iter - 1)

    def _is_due(self, iterations: int) -> bool:
        # The last one is that of after_train.
        periodic = self._period > 0 and iterations % self._period == 0
        return periodic and iterations != self.trainer.max_iter

    def _judge(self, iteration: int) -> None:
        if not (self._metric and comm.is_main_process()):
            return
        latest = self.trainer.storage.latest()
        if self._metric not in latest:
            figures = [name for name in latest if "/" in name]
            logger.error(
                f"TEST.BEST_METRIC is '{self._metric}', which is not among the figures "
                f"{', '.join(figures)}{did_you_mean(self._metric, figures)}"
            )
            return
        value = float(latest[self._metric][0])
        if math.isnan(value) or value <= self._best.get("value", -math.inf):
            return
        self._best = {"value": value, "iteration": iteration}
        self._checkpointer.save("model_best", tag=False, iteration=iteration)
        logger.info(f"model_best.pth has {self._metric} {value:.4f}, the best yet")
