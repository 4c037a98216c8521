"""One training step: mixed precision on any device, and a batch computed in parts."""

import logging
import time
from contextlib import nullcontext
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import SimpleTrainer
from torch.nn.parallel import DistributedDataParallel

from mask_rcnn_plus.engine.accumulation import Plan, make_plan, obstacle

logger = logging.getLogger(__name__)

AMP_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


def amp_dtype(cfg: CfgNode) -> str:
    """The key of ``AMP_DTYPES`` that a config trains in; "" for full precision."""
    return cfg.SOLVER.AMP.DTYPE if cfg.SOLVER.AMP.ENABLED else ""


class Steps(SimpleTrainer):
    """Takes the place of detectron2's SimpleTrainer and AMPTrainer.

    In full precision and one part it computes what SimpleTrainer does, bit for bit. The losses are
    brought to the host together instead of one by one.

    Args:
        model: as SimpleTrainer's, and so are the next two.
        data_loader: gives batches, each a list of samples.
        optimizer: of the model.
        amp: autocast to this type, of ``AMP_DTYPES``; "" for none. fp16 scales the loss, so that
            small gradients are not lost; bf16, whose range is fp32's, needs no scale.
        parts: into how many a batch is cut, one after the other in the memory of one.
        exact: the parts' gradients add up to that of the whole batch within rounding, at the price
            of a forward pass of backbone and RPN (see accumulation.py). Else, and where the model
            does not allow it, which the log says once, each part is the batch of another process:
            it draws for itself, and its losses are means over its own RoIs.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        data_loader: Any,
        optimizer: torch.optim.Optimizer,
        *,
        amp: str = "",
        parts: int = 1,
        exact: bool = True,
    ) -> None:
        super().__init__(model, data_loader, optimizer)
        self._amp = amp
        self._parts = parts
        self._exact = exact and parts > 1
        self._device = next(model.parameters()).device.type
        self.loss_names: tuple[str, ...] = ()
        """Of the model's losses, once it has done a step."""
        self.grad_scaler = None
        if amp == "fp16":
            self.grad_scaler = torch.amp.GradScaler(self._device)

    def run_step(self) -> None:
        assert self.model.training, "the model is not in training mode"
        start = time.perf_counter()
        batch = next(self._data_loader_iter)
        data_time = time.perf_counter() - start

        self.optimizer.zero_grad()
        sums: dict[str, torch.Tensor] = {}
        parts = [range(i, len(batch), self._parts) for i in range(self._parts)]
        plan = self._plan(batch, parts)
        for part in parts:
            # Wrapped for several processes, gradients are exchanged once, with the last part.
            last = part is parts[-1]
            wrapped = isinstance(self.model, DistributedDataParallel)
            with self.model.no_sync() if wrapped and not last else nullcontext():
                self._add_gradients(batch, part, plan, sums)
        self.loss_names = tuple(sums)
        self._write_metrics(_on_host(sums), data_time)
        if self.grad_scaler is None:
            self.optimizer.step()
            return
        # Before whatever looks at gradients in the optimiser's step, such as clipping.
        self.grad_scaler.unscale_(self.optimizer)
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()

    def _plan(self, batch: list[Any], parts: list[range]) -> Plan | None:
        if not self._exact:
            return None
        model = self._bare_model
        if why := obstacle(model):
            self._exact = False
            logger.warning(
                "SOLVER.ACCUMULATE_STEPS: gradients are those of %d processes, not exactly those "
                "of the whole batch, as %s",
                *(self._parts, why),
            )
            return None
        with self._autocast():
            return make_plan(model, batch, parts)

    def _add_gradients(
        self, batch: list[Any], part: range, plan: Plan | None, sums: dict[str, torch.Tensor]
    ) -> None:
        followed = plan.followed(self._bare_model, part) if plan else nullcontext()
        with followed, self._autocast():
            losses = self.model([batch[i] for i in part])
            if isinstance(losses, torch.Tensor):
                losses = {"total_loss": losses}
            if self._parts > 1:
                losses = {
                    name: loss * (plan.weight(name, part) if plan else 1 / self._parts)
                    for name, loss in losses.items()
                }
            loss = sum(losses.values())
        (loss if self.grad_scaler is None else self.grad_scaler.scale(loss)).backward()
        for name, value in losses.items():
            sums[name] = sums.get(name, 0) + value.detach()

    @property
    def _bare_model(self) -> torch.nn.Module:
        wrapped = isinstance(self.model, DistributedDataParallel)
        return self.model.module if wrapped else self.model

    def _autocast(self) -> torch.autocast:
        # One a pass: it keeps the weights that it has cast, without gradients where it had none.
        dtype = AMP_DTYPES.get(self._amp)
        return torch.autocast(self._device, dtype, enabled=dtype is not None)

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        if self.grad_scaler is not None:
            state["grad_scaler"] = self.grad_scaler.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        stored = state_dict["optimizer"]
        groups = [
            # As SOLVER.FUSED has it now: a scaler asks the optimiser, and its step asks the group.
            {**group, "fused": own["fused"]} if "fused" in own else group
            for group, own in zip(stored["param_groups"], self.optimizer.param_groups, strict=True)
        ]
        super().load_state_dict({**state_dict, "optimizer": {**stored, "param_groups": groups}})
        # Absent where the run began in another precision.
        if self.grad_scaler is not None and "grad_scaler" in state_dict:
            self.grad_scaler.load_state_dict(state_dict["grad_scaler"])


def _on_host(losses: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same on the CPU, after one wait for the device."""
    values = torch.stack([loss.float() for loss in losses.values()]).cpu()
    return dict(zip(losses, values, strict=True))
