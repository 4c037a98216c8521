"""SOLVER.LOGGERS: sends a run's metrics to Weights & Biases or MLflow, beside TensorBoard."""

import json
import logging
import os
import re
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.engine.hooks import PeriodicWriter
from detectron2.utils.events import EventWriter, get_event_storage

from mask_rcnn_plus.config.reading import flatten
from mask_rcnn_plus.engine import saving
from mask_rcnn_plus.engine.curves import CURVES
from mask_rcnn_plus.errors import reason

logger = logging.getLogger(__name__)

_PERIOD = 20  # iterations, as detectron2's writers; also the number of values that they smooth over


class _Wandb:
    """A run of Weights & Biases. Its environment variables, such as WANDB_MODE, apply."""

    def __init__(self, folder: Path, config: dict[str, Any], run_id: str | None) -> None:
        import wandb

        self._image = wandb.Image
        self._run = wandb.init(
            id=run_id,
            resume="allow" if run_id else None,
            name=folder.name,
            config=config,
            dir=os.environ.get("WANDB_DIR", str(folder)),
        )
        self.id = self._run.id
        # wandb's own step would drop the iterations that a resumed run repeats.
        self._run.define_metric("*", step_metric="iteration")

    def log(self, metrics: dict[str, float], iteration: int) -> None:
        self._run.log({**metrics, "iteration": iteration})

    def log_picture(self, path: Path) -> None:
        self._run.log({path.stem: self._image(str(path))})

    def finish(self, *, whole: bool) -> None:
        self._run.finish(exit_code=0 if whole else 1)


class _Mlflow:
    """A run of MLflow. Its environment variables, such as MLFLOW_TRACKING_URI, apply."""

    def __init__(self, folder: Path, config: dict[str, Any], run_id: str | None) -> None:
        import mlflow

        self._mlflow = mlflow
        self.id = mlflow.start_run(run_id=run_id, run_name=folder.name).info.run_id
        items = [] if run_id else [(key, str(value)[:500]) for key, value in config.items()]
        for start in range(0, len(items), 100):  # at most 100 per request
            mlflow.log_params(dict(items[start : start + 100]))

    def log(self, metrics: dict[str, float], iteration: int) -> None:
        # Names of classes can have characters that MLflow refuses.
        named = {re.sub(r"[^\w.\-: /]", "_", name): value for name, value in metrics.items()}
        self._mlflow.log_metrics(named, step=iteration)

    def log_picture(self, path: Path) -> None:
        self._mlflow.log_artifact(str(path))

    def finish(self, *, whole: bool) -> None:
        self._mlflow.end_run("FINISHED" if whole else "KILLED")


_SERVICES: dict[str, Any] = {"wandb": _Wandb, "mlflow": _Mlflow}


class ServiceWriter(EventWriter):
    """Writes metrics, config and pictures of a run to one service.

    An error of the service is one warning, after which nothing more is sent to it; the run goes on.

    Args:
        name: one of SOLVER.LOGGERS.
        cfg: the config of the run. The id of its run in the service is kept in
            ``OUTPUT_DIR/loggers.json``, so that a resumed run continues it.
    """

    def __init__(self, name: str, cfg: CfgNode) -> None:
        self._name = name
        self._cfg = cfg
        self._folder = Path(cfg.OUTPUT_DIR)
        self._run: Any = None
        self._last = -1

    def start(self, *, resumed: bool) -> None:
        """Starts a run of the service, or continues the one of a resumed run."""
        self._attempt(lambda: self._start(resumed))

    def _start(self, resumed: bool) -> None:
        path = self._folder / "loggers.json"
        ids = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        run_id = ids.get(self._name) if resumed else None
        self._run = _SERVICES[self._name](self._folder, dict(flatten(self._cfg)), run_id)
        saving.write_text(path, json.dumps({**ids, self._name: self._run.id}))

    def write(self) -> None:
        rows: dict[int, dict[str, float]] = defaultdict(dict)
        latest = get_event_storage().latest_with_smoothing_hint(_PERIOD)
        for name, (value, iteration) in latest.items():
            if iteration > self._last:
                rows[iteration][name] = value
        self._last = max(rows, default=self._last)
        if self._run:
            self._attempt(lambda: [self._run.log(rows[i], i) for i in sorted(rows)])

    def close(self) -> None:
        if self._run:
            whole = sys.exc_info()[0] is None  # no exception is ending the run
            pictures = [*sorted(self._folder.glob("preview_*.png")), self._folder / CURVES]
            shown = [path for path in pictures if whole and path.is_file()]
            self._attempt(lambda: [self._run.log_picture(path) for path in shown])
        if self._run:
            self._attempt(lambda: self._run.finish(whole=whole))

    def _attempt(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except Exception as error:
            self._run = None
            logger.warning(
                f"SOLVER.LOGGERS {self._name} stops, the training goes on: "
                f"{type(error).__name__}: {reason(error)}"
            )


class Loggers(PeriodicWriter):
    """The writers of SOLVER.LOGGERS; only for the main process."""

    def __init__(self, cfg: CfgNode) -> None:
        super().__init__([ServiceWriter(name, cfg) for name in cfg.SOLVER.LOGGERS], _PERIOD)

    def before_train(self) -> None:
        for writer in self._writers:
            writer.start(resumed=self.trainer.start_iter > 0)
