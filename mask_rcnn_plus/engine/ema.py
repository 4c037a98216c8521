"""Averaged weights: an exponential moving average over the course of a run (SOLVER.EMA)."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from detectron2.engine import HookBase
from torch import Tensor, nn

from mask_rcnn_plus.engine.checkpoint import Checkpointer

# Of what a run keeps of the averages: model_ema_final.pth, and figures such as "ema/segm/AP".
NAME = "ema"


class WeightAverage(HookBase):
    """Averages the weights after each step: Polyak's averaging with exponential weights.

    Floating-point buffers (statistics of batch norms) are averaged as well, others copied. The
    averages lie in each checkpoint of the run, so that a resumed one goes on with their bits.

    Args:
        decay: what the average keeps of itself after many steps, 0 to below 1.
        warmup: after step t, counted from 1, it keeps no more than (1 + t) / (warmup + t): early
            averages follow weights that still change fast. 1 is none.
        checkpointer: what saves ``model_ema_final.pth``, in the main process alone.
    """

    def __init__(self, *, decay: float, warmup: float, checkpointer: Checkpointer) -> None:
        self._decay = decay
        self._warmup = warmup
        self._checkpointer = checkpointer
        self._steps = 0
        self._average: dict[str, Tensor] = {}

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self._steps, "average": self._average}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._steps, self._average = state["steps"], state["average"]

    def before_train(self) -> None:
        now = _tensors(self.trainer.model)
        stored = self._average if self._average.keys() == now.keys() else now
        self._average = {
            name: stored[name].detach().to(value.device, copy=True) for name, value in now.items()
        }

    @torch.no_grad()
    def after_step(self) -> None:
        self._steps += 1
        keep = min(self._decay, (1 + self._steps) / (self._warmup + self._steps))
        for name, value in _tensors(self.trainer.model).items():
            if value.is_floating_point():
                self._average[name].lerp_(value, 1 - keep)
            else:
                self._average[name].copy_(value)

    def after_train(self) -> None:
        if self.trainer.finished:
            self.save("final", self.trainer.max_iter - 1)

    def save(self, name: str, iteration: int) -> str:
        """Writes the averages as a checkpoint of weights alone.

        Args:
            name: of ``model_ema_NAME.pth``.
            iteration: stored with it.

        Returns:
            the file's name.
        """
        file = f"model_{NAME}_{name}"
        self._checkpointer.save_weights(file, self._average, iteration=iteration)
        return f"{file}.pth"

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within, the model has the averages; afterwards its own weights, to the bit."""
        tensors = _tensors(self.trainer.model)
        own = {name: value.detach().clone() for name, value in tensors.items()}
        _copy(self._average, tensors)
        try:
            yield
        finally:
            _copy(own, tensors)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers that a checkpoint has, by name, sharing their memory."""
    return getattr(model, "module", model).state_dict()


@torch.no_grad()
def _copy(source: dict[str, Tensor], target: dict[str, Tensor]) -> None:
    for name, value in target.items():
        value.copy_(source[name])
