"""SOLVER.OPTIMIZER."""

from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.solver import build_optimizer as build_sgd
from detectron2.solver.build import get_default_optimizer_params, maybe_add_gradient_clipping

from mask_rcnn_plus.errors import UserError


def build_optimizer(cfg: CfgNode, model: torch.nn.Module) -> torch.optim.Optimizer:
    """detectron2's SGD, or AdamW with the same rules for norm layers, biases and clipping."""
    solver = cfg.SOLVER
    if solver.OPTIMIZER == "SGD":
        return build_sgd(cfg, model)
    groups = get_default_optimizer_params(
        model,
        base_lr=solver.BASE_LR,
        weight_decay=solver.WEIGHT_DECAY,
        weight_decay_norm=solver.WEIGHT_DECAY_NORM,
        bias_lr_factor=solver.BIAS_LR_FACTOR,
        weight_decay_bias=solver.WEIGHT_DECAY_BIAS,
    )
    return maybe_add_gradient_clipping(cfg, torch.optim.AdamW)(groups, solver.BASE_LR)


def require_same_kind(
    stored: dict[str, Any], optimizer: torch.optim.Optimizer, setting: str
) -> None:
    """Compares a stored optimiser's state with the one that is to take it.

    Args:
        stored: its ``state_dict``.
        optimizer: of the run.
        setting: SOLVER.OPTIMIZER.

    Raises:
        UserError: one is SGD, the other AdamW, or they train other parameters.
    """
    if _kind(stored["param_groups"]) != _kind(optimizer.param_groups):
        raise UserError(
            f"SOLVER.OPTIMIZER is '{setting}', and the checkpoint to resume "
            "from was trained with the other one: keep it, or start anew from its weights with "
            "MODEL.WEIGHTS and without --resume"
        )
    if _sizes(stored["param_groups"]) != _sizes(optimizer.param_groups):
        raise UserError(
            "the checkpoint to resume from was trained with other parameters frozen (MODEL.FREEZE, "
            "FREEZE_AT): keep them, or start anew from its weights with MODEL.WEIGHTS and without "
            "--resume"
        )


def _kind(param_groups: list[dict[str, Any]]) -> set[str]:
    """What tells SGD's state from AdamW's."""
    return {"momentum", "betas"} & set().union(*param_groups)


def _sizes(param_groups: list[dict[str, Any]]) -> list[int]:
    return [len(group["params"]) for group in param_groups]
