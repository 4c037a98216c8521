"""The optimiser that a config describes, and what a checkpoint's must have in common with it."""

from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.solver.build import get_default_optimizer_params, maybe_add_gradient_clipping

from mask_rcnn_plus.errors import UserError


def build_optimizer(cfg: CfgNode, model: torch.nn.Module) -> torch.optim.Optimizer:
    """detectron2's SGD, or AdamW with the same rules for norm layers, biases and clipping.

    With SOLVER.FUSED the update of all parameters is one kernel, which rounds a little otherwise.
    """
    solver = cfg.SOLVER
    groups = get_default_optimizer_params(
        model,
        base_lr=solver.BASE_LR,
        weight_decay=solver.WEIGHT_DECAY,
        weight_decay_norm=solver.WEIGHT_DECAY_NORM,
        bias_lr_factor=solver.BIAS_LR_FACTOR,
        weight_decay_bias=solver.WEIGHT_DECAY_BIAS,
    )
    fused = True if solver.FUSED else None
    if solver.OPTIMIZER == "ADAMW":
        kind = maybe_add_gradient_clipping(cfg, torch.optim.AdamW)
        return kind(groups, solver.BASE_LR, fused=fused)
    return maybe_add_gradient_clipping(cfg, torch.optim.SGD)(
        groups,
        solver.BASE_LR,
        momentum=solver.MOMENTUM,
        nesterov=solver.NESTEROV,
        weight_decay=solver.WEIGHT_DECAY,
        fused=fused,
    )


def require_same_kind(cfg: CfgNode, optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Compares an optimiser with the state that it is to go on from.

    Raises:
        UserError: the state is that of another kind.
    """
    if _kind(state["param_groups"]) != _kind(optimizer.param_groups):
        raise UserError(
            f"SOLVER.OPTIMIZER is '{cfg.SOLVER.OPTIMIZER}', and the checkpoint to resume "
            "from was trained with the other one: keep it, or start anew from its weights with "
            "MODEL.WEIGHTS and without --resume"
        )


def _kind(param_groups: list[dict[str, Any]]) -> set[str]:
    """What tells SGD's state from AdamW's."""
    return {"momentum", "betas"} & set().union(*param_groups)
