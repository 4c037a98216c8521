"""SOLVER.EMA: an exponential moving average of the weights during a run."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from detectron2.engine import HookBase
from torch import Tensor, nn

from mask_rcnn_plus.engine.checkpoint import Checkpointer

# In the names of files and metrics: model_ema_final.pth, "ema/segm/AP".
NAME = "ema"


class WeightAverage(HookBase):
    """Averages the weights after each step (Polyak averaging with exponential weights).

    Floating-point buffers (statistics of batch norms) are averaged too, others are copied. Each
    checkpoint contains the averages, so that a resumed run continues bit for bit.

    Args:
        decay: the share of itself that the average keeps per step, from 0 to below 1.
        warmup: after step t, counted from 1, the average keeps at most (1 + t) / (warmup + t), so
            that it follows early weights, which change fast. 1 for no warmup.
        checkpointer: saves ``model_ema_final.pth``, in the main process only.
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
        current = _tensors(self.trainer.model)
        stored = self._average if self._average.keys() == current.keys() else current
        self._average = {
            name: stored[name].detach().to(value.device, copy=True)
            for name, value in current.items()
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
        """Saves the averages as ``model_ema_<name>.pth``; returns the name of the file."""
        file = f"model_{NAME}_{name}"
        self._checkpointer.save_weights(file, self._average, iteration=iteration)
        return f"{file}.pth"

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Gives the model the averaged weights, and afterwards its own, bit for bit."""
        tensors = _tensors(self.trainer.model)
        own = {name: value.detach().clone() for name, value in tensors.items()}
        _copy(self._average, tensors)
        try:
            yield
        finally:
            _copy(own, tensors)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """The parameters and saved buffers by name; they share memory with the model."""
    return getattr(model, "module", model).state_dict()


@torch.no_grad()
def _copy(source: dict[str, Tensor], target: dict[str, Tensor]) -> None:
    for name, value in target.items():
        value.copy_(source[name])
