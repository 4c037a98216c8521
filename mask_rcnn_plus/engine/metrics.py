"""Metrics during a run: when they are measured, what they decide, and how a resumed run keeps them.

Metrics are those of an evaluation, such as "segm/AP", and the validation losses. A watcher follows
one metric: it keeps the best checkpoint, or ends the run early.
"""

import json
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from detectron2.engine import HookBase
from detectron2.engine.hooks import EvalHook
from detectron2.utils import comm

from mask_rcnn_plus.engine.checkpoint import Checkpointer
from mask_rcnn_plus.engine.stops import Interrupt, StopSignals
from mask_rcnn_plus.engine.validation import NAME as VALIDATION
from mask_rcnn_plus.engine.validation import TOTAL, ValidationLoss
from mask_rcnn_plus.errors import UserError, did_you_mean

logger = logging.getLogger(__name__)

# detectron2's writers smooth over this many values.
_WINDOW = 20


class Metric:
    """The name of a metric, and which of two values is better.

    Args:
        name: as in TensorBoard, "segm/AP" or "validation/total_loss".
        mode: "max" (larger is better), "min", or "auto": smaller is better if the name contains
            "loss", apart from names of data sets and classes (AP-NAME).
    """

    def __init__(self, name: str, mode: str = "auto") -> None:
        self.name = name
        kind = name.partition("/AP-")[0].rsplit("/", 1)[-1]
        self._smaller_is_better = mode == "min" or (mode == "auto" and "loss" in kind)

    @property
    def direction(self) -> str:
        return "fallen" if self._smaller_is_better else "risen"

    def better(self, value: float, than: float | None, min_delta: float = 0.0) -> bool:
        """Whether a value is better by more than ``min_delta``.

        NaN is never better, and any other value is better than None.
        """
        if math.isnan(value) or than is None:
            return not math.isnan(value)
        return (than - value if self._smaller_is_better else value - than) > min_delta


class BestCheckpoint:
    """Keeps the checkpoint with the best value of a metric.

    ``save`` saves the weights of an iteration, and returns the name of the file.
    """

    key = "best"
    setting = "TEST.BEST_METRIC"

    def __init__(self, metric: Metric, save: Callable[[int], str]) -> None:
        self.metric = metric
        self._save = save
        self.state: dict[str, Any] = {}

    def update(self, value: float, iteration: int) -> None:
        """Accepts a new value, in the main process."""
        if self.metric.better(value, self.state.get("value")):
            self.state = {"value": value, "iteration": iteration}
            file = self._save(iteration)
            logger.info(f"{file}: {self.metric.name} {value:.4f} is the best so far")


class EarlyStopping:
    """Ends a run when a metric has stopped improving.

    Args:
        metric: the metric.
        patience: the number of values in a row that may fail to improve.
        min_delta: the improvement that a value has to exceed, 0 or more.
    """

    key = "early_stopping"
    setting = "TEST.EARLY_STOPPING.METRIC"

    def __init__(self, metric: Metric, *, patience: int, min_delta: float = 0.0) -> None:
        self.metric = metric
        self._patience = patience
        self._min_delta = min_delta
        self.state: dict[str, Any] = {}

    def update(self, value: float, iteration: int) -> None:
        """Accepts a new value, in the main process."""
        if self.metric.better(value, self.state.get("value"), self._min_delta):
            self.state = {"value": value, "iteration": iteration, "waited": 0}
        else:
            self.state["waited"] = self.state.get("waited", 0) + 1

    def reason_to_end(self) -> str:
        """The reason why the run should end; "" to continue."""
        if self.state.get("waited", 0) < self._patience:
            return ""
        best = "it never had a value"
        if "value" in self.state:
            best = f"best: {self.state['value']:.4f} at iteration {self.state['iteration']}"
        delta = f" by more than {self._min_delta:g}" if self._min_delta else ""
        return (
            f"{self.metric.name} has not {self.metric.direction}{delta} for "
            f"{self.state['waited']} evaluations ({best}; TEST.EARLY_STOPPING)"
        )


Watcher = BestCheckpoint | EarlyStopping


class Evaluation(EvalHook):
    """Evaluates, measures validation losses, and passes both to watchers.

    A signal ends an evaluation at once. This replaces detectron2's BestCheckpointer, which forgets
    the best value when a run resumes, and makes the run resume from the best checkpoint.

    Args:
        evaluate: returns nested metrics.
        period: iterations between evaluations, with one more at the end; 0 for only that one.
        validation: measures the losses; None to measure none.
        loss_period: the same for the losses.
        watchers: follow the metrics.
        checkpointer: saves the run, in the main process.
        signals: the signals of the run.
    """

    def __init__(
        self,
        evaluate: Callable[[], dict[str, Any]],
        *,
        period: int,
        validation: ValidationLoss | None = None,
        loss_period: int = 0,
        watchers: Sequence[Watcher] = (),
        checkpointer: Checkpointer,
        signals: StopSignals,
    ) -> None:
        super().__init__(period, evaluate)
        self._validation = validation
        self._loss_period = loss_period
        self._watchers = watchers
        self._checkpointer = checkpointer
        self._signals = signals
        self._last_evaluation = self._last_losses = -1
        # The last iteration whose metrics the watchers have seen.
        self._shown = -1

    def state_dict(self) -> dict[str, Any]:
        if not self._watchers:
            return {}
        states = {watcher.key: watcher.state for watcher in self._watchers}
        return {"shown": self._shown, **states}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._shown = state.get("shown", -1)
        for watcher in self._watchers:
            watcher.state = dict(state.get(watcher.key, {}))

    def before_train(self) -> None:
        if not (self._watchers and self.trainer.start_iter):
            return
        last = self.trainer.start_iter - 1
        if self._end_early(last):
            return
        # The run may have been killed after saving this checkpoint and before evaluating it.
        if self._shown < last and any(self._due(last)):
            logger.info("Evaluating the checkpoint that the run resumes from")
            self.trainer.storage.iter = last
            self._measure(last, *self._due(last))

    def after_step(self) -> None:
        if self.trainer.iter == self.trainer.start_iter:
            self._check_losses()
        if any(due := self._due(self.trainer.iter)):
            self._measure(self.trainer.iter, *due)

    def after_train(self) -> None:
        if self.trainer.finished:
            last = self.trainer.max_iter - 1
            # A run that ended early has just been measured.
            losses = self._validation is not None and self._last_losses != last
            self._measure(last, self._last_evaluation != last, losses)
        del self._func  # as EvalHook does: it refers to the trainer

    def _due(self, iteration: int) -> tuple[bool, bool]:
        """Whether to evaluate after an iteration, and whether to measure losses."""
        done = iteration + 1
        if done == self.trainer.max_iter:  # after_train measures
            return False, False
        evaluate, losses = (
            period > 0 and done % period == 0 for period in (self._period, self._loss_period)
        )
        return evaluate, losses

    def _measure(self, iteration: int, evaluate: bool, losses: bool) -> None:
        with self._signals.at_once():
            if losses and self._validation is not None:
                metrics = self._validation.measure(self.trainer.model)
                self.trainer.storage.put_scalars(**metrics, smoothing_hint=False)
                self._last_losses = iteration
                totals = (f"{name} {v:.4f}" for name, v in metrics.items() if "total" in name)
                logger.info(", ".join(totals))
            if evaluate:
                self._do_eval()
                self._last_evaluation = iteration
        if comm.is_main_process():
            for watcher in self._watchers:
                if losses if watcher.metric.name.startswith(f"{VALIDATION}/") else evaluate:
                    self._update(watcher, iteration)
        self._shown = iteration
        if self._watchers:
            self._end_early(iteration)

    def _check_losses(self) -> None:
        """After the first step, refuses to watch a loss that the model does not have.

        Every process ends, because the others would wait for the main one, which says why.
        """
        losses = sorted({*self.trainer._trainer.loss_names, TOTAL})
        for watcher in self._watchers:
            name = watcher.metric.name
            if not name.startswith(f"{VALIDATION}/") or self._validation is None:
                continue
            loss = name.removeprefix(self._validation.prefix_of(name))
            if loss not in losses:
                if not comm.is_main_process():
                    raise Interrupt(UserError.exit_code)
                hint = did_you_mean(loss, losses) or f"; its losses: {', '.join(losses)}"
                raise UserError(
                    f"{watcher.setting} is '{name}', but the model has no loss '{loss}'{hint}"
                )

    def _update(self, watcher: Watcher, iteration: int) -> None:
        latest = self.trainer.storage.latest()
        value, measured_at = latest.get(watcher.metric.name, (0.0, None))
        if measured_at == self.trainer.storage.iter:
            watcher.update(float(value), iteration)
            return
        metrics = [name for name in latest if "/" in name]
        logger.error(
            f"{watcher.setting} is '{watcher.metric.name}', which this evaluation did not measure; "
            f"its metrics: {', '.join(metrics)}{did_you_mean(watcher.metric.name, metrics)}"
        )

    def _end_early(self, iteration: int) -> bool:
        """Ends the run after an iteration if early stopping says so; every process must call it."""
        reasons = [w.reason_to_end() for w in self._watchers if isinstance(w, EarlyStopping)]
        # Only the main process has metrics.
        reason = "".join(comm.all_gather(reasons)[0])
        if not reason:
            return False
        if iteration + 1 < self.trainer.max_iter:
            logger.info(f"The run ends after {iteration + 1} iterations: {reason}")
            self.trainer.max_iter = iteration + 1
            if comm.is_main_process():
                self._checkpointer.save("model_final", iteration=iteration)
        return True


class MetricsHistory(HookBase):
    """Saves the latest values of every metric with each checkpoint, since writers smooth over them.

    A resumed run cuts the lines of the iterations that it repeats from its ``metrics.json``.
    """

    def __init__(self, metrics_file: Path) -> None:
        self._file = metrics_file
        self._stored: dict[str, list[list[float]]] = {}

    def state_dict(self) -> dict[str, Any]:
        histories = self.trainer.storage.histories() if hasattr(self.trainer, "storage") else {}
        return {name: [list(p) for p in h.values()[-_WINDOW:]] for name, h in histories.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._stored = state

    def before_train(self) -> None:
        for name, points in self._stored.items():
            for value, iteration in points:
                self.trainer.storage.histories()[name].update(value, iteration)
        if self.trainer.start_iter > 0 and comm.is_main_process():
            _cut_lines(self._file, self.trainer.start_iter)


def _cut_lines(path: Path, iteration: int) -> None:
    """Cuts a file of JSON lines at the first line that is damaged or not before an iteration."""
    if not path.is_file():
        return
    size = 0
    with path.open("r+b") as file:
        for line in file:
            try:
                if not line.endswith(b"\n") or json.loads(line)["iteration"] >= iteration:
                    break
            except (ValueError, KeyError, TypeError):
                break
            size += len(line)
        # In place, because the writer has the file open to append.
        file.truncate(size)
