"""Lets the figures of a resumed run go on where those of the interrupted one left off."""

import json
from pathlib import Path
from typing import Any

from detectron2.engine import HookBase
from detectron2.utils import comm

# What detectron2's writers smooth over.
_WINDOW = 20


class MetricsHistory(HookBase):
    """Keeps with each checkpoint the last values of every figure, over which writers smooth.

    Of a resumed run, ``metrics.json`` loses the lines of the iterations that come again.

    Args:
        metrics_file: detectron2's ``metrics.json`` of the run.
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
            _cut(self._file, self.trainer.start_iter)


def _cut(path: Path, iteration: int) -> None:
    """Cuts a file of json lines before the first from an iteration on, or that is no whole line."""
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
        # In place: the writer has the file open, and appends to its end.
        file.truncate(size)
