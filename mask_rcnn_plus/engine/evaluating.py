"""Evaluation in the course of a run, and what follows from its figures."""

import logging
from collections.abc import Sequence
from typing import Any

from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.engine.hooks import EvalHook
from detectron2.utils import comm
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mask_rcnn_plus.engine.checkpoint import Checkpointer
from mask_rcnn_plus.engine.figures import Best, EarlyStopping
from mask_rcnn_plus.engine.stops import Leave, Stops
from mask_rcnn_plus.engine.validation import NAME as VALIDATION
from mask_rcnn_plus.engine.validation import TOTAL, ValidationLoss
from mask_rcnn_plus.errors import UserError, did_you_mean
from mask_rcnn_plus.optimization import OptimizedModel, optimize

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
    """Evaluates as an EvalHook does, measures validation losses, and shows both to watchers.

    A signal ends it at once. detectron2's BestCheckpointer forgets the best figure when a run is
    resumed, and makes the best checkpoint the one to resume from; a watcher does neither.

    Args:
        hook: what evaluates, every ``period`` iterations and at the end.
        period: its period, 0 for the end alone.
        validation: what measures the losses; None for nothing.
        loss_period: its period, with the end.
        watchers: of the figures.
        checkpointer: of the run; in the main process alone anything is saved.
        stops: of the run.
    """

    def __init__(
        self,
        hook: EvalHook,
        *,
        period: int,
        validation: ValidationLoss | None = None,
        loss_period: int = 0,
        watchers: Sequence[Best | EarlyStopping] = (),
        checkpointer: Checkpointer,
        stops: Stops,
    ) -> None:
        self._hook = hook
        self._period = period
        self._validation = validation
        self._loss_period = loss_period
        self._watchers = watchers
        self._checkpointer = checkpointer
        self._stops = stops
        self._latest = {"evaluation": -1, "losses": -1}
        # The last iteration whose figures the watchers have seen.
        self._shown = -1

    def state_dict(self) -> dict[str, Any]:
        if not self._watchers:
            return {}
        return {"shown": self._shown, **{one.key: one.state for one in self._watchers}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._shown = state.get("shown", -1)
        for watcher in self._watchers:
            watcher.state = dict(state.get(watcher.key, {}))

    def before_train(self) -> None:
        self._hook.trainer = trainer = self.trainer
        if not (self._watchers and trainer.start_iter):
            return
        last = trainer.start_iter - 1
        if self._end_if_over(last):
            return
        # A checkpoint is saved before its evaluation, which the run may not have lived to see.
        if self._shown < last and any(self._due(last)):
            logger.info("Evaluating the checkpoint that the run goes on from")
            trainer.storage.iter = last
            self._measure(last, *self._due(last))

    def after_step(self) -> None:
        if self.trainer.iter == self.trainer.start_iter:
            self._check_losses()
        if any(due := self._due(self.trainer.iter)):
            self._measure(self.trainer.iter, *due)

    def after_train(self) -> None:
        if self.trainer.finished:
            last = self.trainer.max_iter - 1
            # A run that ended early did so upon a figure, which is there already.
            evaluate, losses = (iteration != last for iteration in self._latest.values())
            self._measure(last, evaluate, losses and self._validation is not None)
        del self._hook._func  # as EvalHook does: it holds on to the trainer

    def _due(self, iteration: int) -> tuple[bool, bool]:
        """Whether an iteration's weights are evaluated, and their losses measured."""
        done = iteration + 1
        if done == self.trainer.max_iter:  # that is after_train's
            return False, False
        evaluate, losses = (
            period > 0 and done % period == 0 for period in (self._period, self._loss_period)
        )
        return evaluate, losses

    def _measure(self, iteration: int, evaluate: bool, losses: bool) -> None:
        with self._stops.at_once():
            if losses and self._validation is not None:
                figures = self._validation.measure(self.trainer.model)
                self.trainer.storage.put_scalars(**figures, smoothing_hint=False)
                self._latest["losses"] = iteration
                total = {name: value for name, value in figures.items() if "total" in name}
                logger.info(", ".join(f"{name} {value:.4f}" for name, value in total.items()))
            if evaluate:
                self._hook._do_eval()
                self._latest["evaluation"] = iteration
        if comm.is_main_process():
            for watcher in self._watchers:
                of_losses = watcher.figure.name.startswith(f"{VALIDATION}/")
                self._show(watcher, iteration, expected=losses if of_losses else evaluate)
        self._shown = iteration
        if self._watchers:
            self._end_if_over(iteration)

    def _check_losses(self) -> None:
        """Refuses to watch a loss that the model, having done its first step, has not.

        Every process ends, or the others would wait for the main one, which says why.
        """
        losses = sorted({*self.trainer._trainer.loss_names, TOTAL})
        for watcher in self._watchers:
            name = watcher.figure.name
            if not name.startswith(f"{VALIDATION}/") or self._validation is None:
                continue
            loss = name.removeprefix(self._validation.prefix_of(name))
            if loss not in losses:
                if not comm.is_main_process():
                    raise Leave(UserError.exit_code)
                hint = did_you_mean(loss, losses) or f"; there is {', '.join(losses)}"
                raise UserError(
                    f"{watcher.setting} is '{name}', and the model has no loss '{loss}'{hint}"
                )

    def _show(self, watcher: Best | EarlyStopping, iteration: int, *, expected: bool) -> None:
        if not expected:
            return
        storage = self.trainer.storage
        latest = storage.latest()
        value, since = latest.get(watcher.figure.name, (0.0, None))
        if since == storage.iter:
            watcher.look(float(value), iteration)
            return
        figures = [name for name in latest if "/" in name]
        logger.error(
            f"{watcher.setting} is '{watcher.figure.name}', which is not among the figures "
            f"{', '.join(figures)}{did_you_mean(watcher.figure.name, figures)}"
        )

    def _end_if_over(self, iteration: int) -> bool:
        """Makes an iteration the run's last if a watcher says so; every process must call it."""
        reasons = [reason for watcher in self._watchers if (reason := watcher.over())]
        # The main process alone has figures.
        reason = comm.all_gather(reasons[0] if reasons else "")[0]
        if not reason:
            return False
        if iteration + 1 < self.trainer.max_iter:
            logger.info(f"The run ends after {iteration + 1} iterations: {reason}")
            self.trainer.max_iter = iteration + 1
            if comm.is_main_process():
                self._checkpointer.save("model_final", iteration=iteration)
        return True
