"""One training step: mixed precision on any device, and gradient accumulation."""

import time
from contextlib import nullcontext
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import SimpleTrainer
from torch.nn.parallel import DistributedDataParallel

AMP_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


def amp_dtype(cfg: CfgNode) -> str:
    """The key of ``AMP_DTYPES`` that a config trains in; "" for full precision."""
    return cfg.SOLVER.AMP.DTYPE if cfg.SOLVER.AMP.ENABLED else ""


def autocast(model: torch.nn.Module, amp: str) -> torch.autocast:
    """Mixed precision on the model's device; ``amp`` is as from ``amp_dtype``."""
    dtype = AMP_DTYPES.get(amp)
    return torch.autocast(next(model.parameters()).device.type, dtype, enabled=dtype is not None)


class Steps(SimpleTrainer):
    """Replaces detectron2's SimpleTrainer and AMPTrainer.

    In full precision and without accumulation its results equal SimpleTrainer's bit for bit. It
    copies all losses to the host together instead of one by one.

    Args:
        model: returns a mapping of losses, or one loss.
        data_loader: an iterable of batches, each a list of samples.
        optimizer: updates the model.
        amp: autocast to this type, a key of ``AMP_DTYPES``; "" for full precision. fp16 scales the
            loss to keep small gradients; bf16 has the range of fp32 and does not need that.
        parts: number of parts that a batch is computed in, one after the other, with the memory
            of one part. Each part samples its own anchors and RoIs, over which its losses are
            means; the gradient is the mean of the parts' gradients.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        data_loader: Any,
        optimizer: torch.optim.Optimizer,
        *,
        amp: str = "",
        parts: int = 1,
    ) -> None:
        super().__init__(model, data_loader, optimizer)
        self._amp = amp
        self._parts = parts
        self.loss_names: tuple[str, ...] = ()
        """Names of the model's losses, after the first step."""
        self.grad_scaler = None
        if amp == "fp16":
            self.grad_scaler = torch.amp.GradScaler(next(model.parameters()).device.type)

    def run_step(self) -> None:
        """Loads the next batch and trains on it."""
        start = time.perf_counter()
        batch = next(self._data_loader_iter)
        self.train_on(batch, time.perf_counter() - start)

    def train_on(self, batch: list[Any], data_time: float) -> None:
        """Updates the weights with a batch, whose loading took ``data_time`` seconds."""
        assert self.model.training, "the model is not in training mode"
        self.optimizer.zero_grad()
        sums: dict[str, torch.Tensor] = {}
        for part in range(self._parts):
            # Several processes exchange gradients once, with the last part.
            local = isinstance(self.model, DistributedDataParallel) and part < self._parts - 1
            with self.model.no_sync() if local else nullcontext():
                for name, loss in self._add_gradients(batch[part :: self._parts]).items():
                    sums[name] = sums.get(name, 0) + loss
        self.loss_names = tuple(sums)
        # All at once, to wait for the device only once.
        values = torch.stack([loss.float() for loss in sums.values()]).cpu()
        self._write_metrics(dict(zip(sums, values, strict=True)), data_time)
        if self.grad_scaler is None:
            self.optimizer.step()
            return
        # First, because the optimizer's step clips gradients.
        self.grad_scaler.unscale_(self.optimizer)
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()

    def _add_gradients(self, samples: list[Any]) -> dict[str, torch.Tensor]:
        """Adds the gradients of one part; returns its share of each loss."""
        # One autocast per part: its cache of cast weights belongs to one backward pass.
        with autocast(self.model, self._amp):
            losses = self.model(samples)
            if isinstance(losses, torch.Tensor):
                losses = {"total_loss": losses}
            if self._parts > 1:
                losses = {name: loss / self._parts for name, loss in losses.items()}
            loss = sum(losses.values())
        (loss if self.grad_scaler is None else self.grad_scaler.scale(loss)).backward()
        return {name: value.detach() for name, value in losses.items()}

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        if self.grad_scaler is not None:
            state["grad_scaler"] = self.grad_scaler.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        stored = state_dict["optimizer"]
        groups = [
            # SOLVER.FUSED may have changed: the scaler reads it from the optimizer, but the
            # optimizer's step reads it from the group.
            {**group, "fused": own["fused"]} if "fused" in own else group
            for group, own in zip(stored["param_groups"], self.optimizer.param_groups, strict=True)
        ]
        super().load_state_dict({**state_dict, "optimizer": {**stored, "param_groups": groups}})
        # Missing if the run began in another precision.
        if self.grad_scaler is not None and "grad_scaler" in state_dict:
            self.grad_scaler.load_state_dict(state_dict["grad_scaler"])
