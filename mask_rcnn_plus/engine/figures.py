"""Watching one figure of a run: which weights are the best, and when it stops getting better."""

import logging
import math
from collections.abc import Callable
from typing import Any

logger = logging.getLogger(__name__)


class Figure:
    """A figure's name, and which of two values of it is better.

    Args:
        name: as in TensorBoard, "segm/AP" or "validation/total_loss".
        mode: "max" (the larger the better), "min", or "auto": names with "loss" in them fall, the
            names of data sets and classes (AP-NAME) apart.
    """

    def __init__(self, name: str, mode: str = "auto") -> None:
        self.name = name
        kind = name.partition("/AP-")[0].rsplit("/", 1)[-1]
        self._falls = mode == "min" or (mode == "auto" and "loss" in kind)

    @property
    def direction(self) -> str:
        return "fallen" if self._falls else "risen"

    def better(self, value: float, than: float | None, by_more_than: float = 0.0) -> bool:
        """Whether a value is better; NaN never is, and any other is better than None."""
        if math.isnan(value) or than is None:
            return not math.isnan(value)
        return (than - value if self._falls else value - than) > by_more_than


class Best:
    """Keeps the checkpoint with the best value.

    Args:
        figure: looked at.
        save: called with the iteration; saves, and returns the file's name.
    """

    key = "best"
    setting = "TEST.BEST_METRIC"

    def __init__(self, figure: Figure, save: Callable[[int], str]) -> None:
        self.figure = figure
        self._save = save
        self.state: dict[str, Any] = {}

    def look(self, value: float, iteration: int) -> None:
        """Called in the main process with each new value."""
        if self.figure.better(value, self.state.get("value")):
            self.state = {"value": value, "iteration": iteration}
            file = self._save(iteration)
            logger.info(f"{file} has {self.figure.name} {value:.4f}, the best yet")

    def over(self) -> str:
        """Why the run should end; "" to go on."""
        return ""


class EarlyStopping:
    """Ends a run whose figure has stopped getting better.

    Args:
        figure: looked at.
        patience: how many looks in a row it may not get better.
        min_delta: by how much more than this it has to, 0 or more.
    """

    key = "early_stopping"
    setting = "TEST.EARLY_STOPPING.METRIC"

    def __init__(self, figure: Figure, *, patience: int, min_delta: float = 0.0) -> None:
        self.figure = figure
        self._patience = patience
        self._min_delta = min_delta
        self.state: dict[str, Any] = {}

    def look(self, value: float, iteration: int) -> None:
        """Called in the main process with each new value."""
        if self.figure.better(value, self.state.get("value"), self._min_delta):
            self.state = {"value": value, "iteration": iteration, "waited": 0}
        else:
            self.state["waited"] = self.state.get("waited", 0) + 1

    def over(self) -> str:
        """Why the run should end; "" to go on."""
        if self.state.get("waited", 0) < self._patience:
            return ""
        best = "it never had a value"
        if "value" in self.state:
            best = f"the best, {self.state['value']:.4f}, is of iteration {self.state['iteration']}"
        more = f" by more than {self._min_delta:g}" if self._min_delta else ""
        return (
            f"{self.figure.name} has not {self.figure.direction}{more} for "
            f"{self.state['waited']} looks ({best}; TEST.EARLY_STOPPING)"
        )
